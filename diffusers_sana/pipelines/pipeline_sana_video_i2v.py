"""Image-to-video with SANA-Video.

The first latent frame is the encoded image and stays as it is: its time is 0 at every step, and the solver steps the
others.

Legend: B videos (prompts times videos per prompt), n rows of the batch per video, C latent channels, F frames,
T latent frames, t of tokens, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel as UpstreamTransformer
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana_video.pipeline_output import SanaVideoPipelineOutput
from torch import Tensor

from diffusers_sana.pipelines.call import Call
from diffusers_sana.pipelines.conditioning import cover_images, for_each_output, read_images
from diffusers_sana.pipelines.pipeline_sana_base import Size
from diffusers_sana.pipelines.pipeline_sana_video_base import VIDEO_INSTRUCTION, SanaVideoPipelineBase
from diffusers_sana.pipelines.request import VideoRequest
from diffusers_sana.pipelines.resolution import VIDEO_ASPECT_RATIO_BINS
from diffusers_sana.pipelines.sampling import Denoiser, TextInputs, denoise, guided_step, predict_flow
from diffusers_sana.pipelines.video_decoding import encode_videos
from diffusers_sana.prompts.encoding import encode_prompts


FITS = ("stretch", "crop")
MOST_STRETCH = 1.25  # of an image to the proportions of the video; beyond, things look wrong


class SanaImageToVideoPipeline(SanaVideoPipelineBase):
    """An image and a prompt to a video that begins with the image, with SANA-Video (arXiv 2509.24695).

    A drop-in for `diffusers.SanaImageToVideoPipeline`: the same components, arguments, seeds and folders, which are
    those of `SanaVideoPipeline`: `SanaImageToVideoPipeline.from_pipe(pipe)` shares them.

    Args: see `SanaVideoPipeline`.
    """

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 6.0,
        num_videos_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clean_caption: bool = False,
        use_resolution_binning: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 300,
        complex_human_instruction: str | Sequence[str] | None = VIDEO_INSTRUCTION,
        motion_score: int | None = None,
        image_fit: str = "stretch",
        guider: Any = None,
    ) -> SanaVideoPipelineOutput | tuple:
        """Generates videos that begin with images.

        Args:
            image: the first frame: one image for all prompts, or one each. PIL images, arrays `[H, W, 3]` and tensors
                `[3, H, W]` in [0, 1], lists and batches of them.
            prompt: one or several texts.
            height, width: pixels; by default the trained size whose aspect ratio is nearest to that of the image, or
                the size of `latents`.
            latents: noise to begin with, `[B, C, T, h, w]`; its first frame is not used.
            image_fit: how the image gets the size that is generated: "stretch" as in diffusers, or "crop", which
                keeps its proportions and cuts what is over, as the authors' code does.
            the others: as in `SanaVideoPipeline`.

        Returns:
            `SanaVideoPipelineOutput` with `frames`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        # 1. The request and the images, checked; the size asked for and the size that is generated
        request = self._with_frames(VideoRequest.collect(locals(), has_vae=self.vae is not None))
        pixels = self._read_image(image)
        requested_size, size = self._sizes_for(request, pixels)
        self._check(request, size)
        pixels = self._fit(pixels, size, image_fit)

        device = self._execution_device
        with self._begin(request) as call:
            # 2. Text features, [B, L, width], of the prompts and the negative prompts
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)
            num_videos = len(texts["prompt_embeds"])

            # 3. Schedule, noise and image, [B, C, T, h, w] in fp32
            steps = request.lay_out(call.scheduler, device)
            noise = self._noise(request, num_videos, size)
            first = encode_videos(self.vae, pixels.unsqueeze(2).to(device))
            first = for_each_output("image", first, num_videos // num_videos_per_prompt, num_videos_per_prompt)
            latents = torch.cat([first, noise[:, :, 1:]], dim=2)

            # 4. Denoising of all frames but the first
            latents = denoise(
                self.transformer, latents, steps, texts, call, predict=predict_after_first, step=step_after_first
            )

            # 5. Videos
            return self._output(latents, requested_size, request)

    def _read_image(self, image: Any) -> Tensor:
        """The argument `image`, checked: `[N, 3, H, W]` in [0, 1]."""
        if image is None:
            raise ValueError("`image` must be given, got None. Use SanaVideoPipeline to generate without one.")
        if self.vae is None:
            raise ValueError("`image` needs an autoencoder, but this pipeline was made without. Pass `vae`.")
        return read_images("image", image)

    def _sizes_for(self, request: VideoRequest, pixels: Tensor) -> tuple[Size, Size]:
        """`_sizes`, by default for the aspect ratio of the image `[N, 3, H, W]`."""
        is_free = not request.is_sized and request.latents is None and request.use_resolution_binning
        if not is_free or self.transformer.config.sample_size not in VIDEO_ASPECT_RATIO_BINS:
            return self._sizes(request)
        size = self._bin(*pixels.shape[-2:])
        return size, size

    def _fit(self, pixels: Tensor, size: Size, image_fit: str) -> Tensor:
        """Images `[N, 3, H, W]` in [0, 1] at `size`, in [-1, 1]."""
        if image_fit not in FITS:
            raise ValueError(f"`image_fit` must be one of {FITS}, got {image_fit!r}.")
        height, width = pixels.shape[-2:]
        if image_fit == "crop":
            return cover_images(pixels, size) * 2 - 1
        stretch = (height / width) / (size[0] / size[1])
        if not 1 / MOST_STRETCH <= stretch <= MOST_STRETCH:
            raise ValueError(
                f"`image` must have about the proportions of the video, {size[0]} to {size[1]}, got {height} to"
                f" {width}. Leave `height` and `width` out to take those of the image, or cut it with"
                " `image_fit='crop'`."
            )
        if (height, width) == size:
            return pixels * 2 - 1
        processor = self.video_processor  # as diffusers does it: by Lanczos, in 8 bits
        return processor.preprocess(processor.numpy_to_pil(processor.pt_to_numpy(pixels)), *size)


def predict_after_first(model: Denoiser, latents: Tensor, t: Tensor, text: TextInputs) -> Tensor:
    """`predict_flow` with time 0 for the first frame of tokens: of the other latent frames.

    diffusers' transformer takes times of tokens alone.
    """
    grid = [size // p for size, p in zip(latents.shape[2:], model.transformer.config.patch_size, strict=True)]
    times = t.float() * (torch.arange(grid[0], device=t.device) > 0)
    if isinstance(model.transformer, UpstreamTransformer):
        times = times[:, None, None].expand(1, *grid)
    prediction = predict_flow(model, latents, t, text, times=times.expand(len(text.mask), *times.shape))
    return prediction[:, :, 1:]


def step_after_first(
    call: Call, prediction: Tensor, t: Tensor, latents: Tensor, is_guided: bool, options: dict[str, Any]
) -> Tensor:
    """`guided_step` of all latent frames but the first."""
    prediction, others = prediction.contiguous(), latents[:, :, 1:].contiguous()
    return torch.cat([latents[:, :, :1], guided_step(call, prediction, t, others, is_guided, options)], dim=2)
