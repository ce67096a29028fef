"""Text-to-video and image-to-video with SANA-Video 2.0, and text-to-video with its preview of four steps.

Legend: B videos (prompts times videos per prompt), C latent channels, F frames, T latent frames, h w latent height and
width, L text tokens.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, cast

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana_video.pipeline_output import SanaVideoPipelineOutput
from diffusers.schedulers import SchedulerMixin
from torch import Tensor
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from diffusers_sana.checks import check_computed
from diffusers_sana.loaders.lora.formats import convert_sana_video2_lora
from diffusers_sana.locks import exclusive
from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.transformers.transformer_sana_video2 import SanaVideo2Transformer3DModel
from diffusers_sana.pipelines.conditioning import for_each_output
from diffusers_sana.pipelines.pipeline_sana_base import Size
from diffusers_sana.pipelines.pipeline_sana_video_i2v import (
    SanaImageToVideoPipeline,
    predict_after_first,
    step_after_first,
)
from diffusers_sana.pipelines.pipeline_sana_video_long import LONGEST_TIME, NOT_ASKED
from diffusers_sana.pipelines.request import Video2Request, check_descending
from diffusers_sana.pipelines.sampling import both_texts, denoise, project_texts, sample_by_renoising
from diffusers_sana.pipelines.video_decoding import encode_videos
from diffusers_sana.prompts.encoding import encode_prompts
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION


# Of the 4-step preview: a schedule of shift 6 at 0.999 times 1, 3/4, 1/2 and 1/4.
PREVIEW_SIGMAS = (0.9998332262, 0.9471688271, 0.8568977118, 0.6663702130)
WIDE = 16 / 9
NO_BINS = {"use_resolution_binning": False}  # the sizes that it was trained on are not public


class SanaVideo2Pipeline(SanaImageToVideoPipeline):
    """Prompts to videos with SANA-Video 2.0 (arXiv 2607.21553), from an image or without one.

    The authors publish the transformer as `.pth` files, which `SanaVideo2Transformer3DModel.from_single_file` reads.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, Gemma-2-2b-it, in bf16 or fp32: Gemma overflows fp16.
        vae: `AutoencoderKLLTX2Video` of LTX-2.3; or another of `SanaVideoPipeline`, whose latents were trained on.
        transformer: denoiser.
        scheduler: solver of the flow. The authors use `FlowDPMSolverScheduler(flow_shift=12.0)`, and with an image
            `FlowMatchEulerDiscreteScheduler(shift=12.0)`.
    """

    _default_frames = 193  # eight seconds at 24 frames per second
    _convert_lora = staticmethod(convert_sana_video2_lora)

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: Gemma2PreTrainedModel,
        vae: AutoencoderKLLTX2Video | AutoencoderKLWan | AutoencoderDC,
        transformer: SanaVideo2Transformer3DModel,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, cast(Any, transformer), scheduler)

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 8.0,
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
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 300,
        complex_human_instruction: str | Sequence[str] | None = COMPLEX_HUMAN_INSTRUCTION,
        motion_score: int | None = None,
        image_fit: str = "crop",
        guider: Any = None,
    ) -> SanaVideoPipelineOutput | tuple:
        """Generates videos.

        Args:
            prompt: one or several texts.
            image: the first frame: one image for all prompts, or one each; None to generate it, too.
            height, width: pixels; by default those of `latents`, or the native number of pixels in the proportions of
                the image, or in 16:9 without one: 736 x 1280 for the released model.
            frames: F; by default those of `latents`, or 193. One more than a multiple of 8 with LTX's autoencoder.
            complex_human_instruction: text, or its lines, put before each prompt; None for none. The default is that
                of `SanaPipeline`, as in the authors' configuration.
            motion_score: as in `SanaVideoPipeline`; the authors' demo uses 20.
            image_fit: how the image gets the size of the video: "crop", which keeps its proportions, or "stretch".
            the others: as in `SanaVideoPipeline`.

        Returns:
            `SanaVideoPipelineOutput` with `frames`, or a tuple with them. The videos are for 24 frames per second.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        # 1. The request and the images, checked; the size
        arguments = NO_BINS | locals()
        request = self._with_frames(Video2Request.collect(arguments, has_vae=self.vae is not None))
        pixels = None if image is None else self._read_image(image)
        requested_size, size = self._sizes(request) if pixels is None else self._sizes_for(request, pixels)
        self._check(request, size)
        pixels = None if pixels is None else self._fit(pixels, size, image_fit)

        device = self._execution_device
        with self._begin(request) as call:
            # 2. Text features, [B, L, width], of the prompts and the negative prompts
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)
            num_videos = len(texts["prompt_embeds"])

            # 3. Schedule, noise and image, [B, C, T, h, w] in fp32
            steps = request.lay_out(call.scheduler, device)
            latents = self._noise(request, num_videos, size)
            first: dict[str, Any] = {}
            if pixels is not None:
                clean = encode_videos(self.vae, pixels.unsqueeze(2).to(device))
                clean = for_each_output("image", clean, num_videos // num_videos_per_prompt, num_videos_per_prompt)
                latents = torch.cat([clean, latents[:, :, 1:]], dim=2)
                first = {"predict": predict_after_first, "step": step_after_first}

            # 4. Denoising of all frames, or of all but the first
            latents = denoise(self.transformer, latents, steps, texts, call, **first)

            # 5. Videos
            return self._output(latents, requested_size, request)

    @property
    def _native_video_size(self) -> Size:
        cell = self.vae_scale_factor * max(self._patch_sides)
        height = self.transformer.config.sample_size * cell
        return height, int(height * WIDE) // cell * cell

    def _sizes_for(self, request: Any, pixels: Tensor) -> tuple[Size, Size]:
        """`_sizes`, by default for the aspect ratio of the image `[N, 3, H, W]`."""
        if request.is_sized or request.latents is not None:
            return self._sizes(request)
        cell = self.vae_scale_factor * max(self._patch_sides)
        height, width = self._native_video_size
        shape = sqrt(pixels.shape[-2] / pixels.shape[-1])
        area = sqrt(height * width)
        size = tuple(max(round(side / cell), 1) * cell for side in (area * shape, area / shape))
        return cast(tuple[Size, Size], (size, size))


class SanaVideo2PreviewPipeline(SanaVideo2Pipeline):
    """Prompts to videos in four steps with the preview of SANA-Video 2.0, without guidance and images.

    Components are those of `SanaVideo2Pipeline`, with the weights of the preview. The scheduler is not used.

    Args: see `SanaVideo2Pipeline`.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        sigmas: Sequence[float] = PREVIEW_SIGMAS,
        num_videos_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clean_caption: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        max_sequence_length: int = 300,
        complex_human_instruction: str | Sequence[str] | None = COMPLEX_HUMAN_INSTRUCTION,
        motion_score: int | None = None,
    ) -> SanaVideoPipelineOutput | tuple:
        """Generates videos.

        Args:
            sigmas: noise levels of the steps, descending, above 0 and at most 1; the timestep is a thousand times
                the level. A last 0 is left out. The default is what the preview was distilled at.
            latents: noise to begin with, `[B, C, T, h, w]`; fresh noise is added at each later step.
            the others: as in `SanaVideo2Pipeline`.

        Returns:
            `SanaVideoPipelineOutput` with `frames`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        # 1. The request, checked; the size
        levels = check_descending("sigmas", sigmas, 1, PREVIEW_SIGMAS)
        arguments = NOT_ASKED | NO_BINS | {"negative_prompt": ""} | locals() | {"sigmas": None}
        request = self._with_frames(Video2Request.collect(arguments, has_vae=self.vae is not None))
        requested_size, size = self._sizes(request)
        self._check(request, size)
        if self._cuda_graphs is not None:
            raise ValueError("CUDA graphs are not used by this pipeline. Call `disable_cuda_graphs()`.")
        if getattr(self.transformer, "is_cache_enabled", False):
            raise ValueError(
                "A step cache cannot be used with so few steps, each from new noise. Call"
                " `transformer.disable_cache()`."
            )

        # 2. Text features, projected once for all steps
        device = self._execution_device
        texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=False, device=device)
        text = project_texts(self.transformer, *both_texts(texts, False), False, attention_kwargs)

        # 3. Noise, [B, C, T, h, w] in fp32, and four steps
        with self.progress_bar(total=len(levels)) as progress_bar:

            def predict(latents: Tensor, time: float) -> Tensor:
                with exclusive(self.transformer):
                    (velocity,) = self.transformer(
                        hidden_states=latents.to(self.transformer.dtype),
                        timestep=torch.full((len(latents),), time, device=latents.device),
                        attention_kwargs=attention_kwargs,
                        return_dict=False,
                        **text.arguments,
                    )
                progress_bar.update()
                return velocity.float()

            noise = self._noise(request, len(text.mask), size)
            times = [level * LONGEST_TIME for level in levels]
            made = sample_by_renoising(predict, noise, times, levels, generator)
        advice = "Its weights may be damaged, or its LoRA too large."
        check_computed("transformer", "latents", made, self.transformer.dtype, advice)

        # 4. Videos
        return self._output(made, requested_size, request)
