"""Image-to-image with SANA-Sprint, in one to four steps.

Legend: B outputs (prompts times images per prompt), N images given, C latent channels, h w latent height and width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.images import to_rgb
from diffusers_sana.pipelines.conditioning import StartImage, for_each_output, read_images
from diffusers_sana.pipelines.decoding import encode_images
from diffusers_sana.pipelines.pipeline_sana_base import Size
from diffusers_sana.pipelines.pipeline_sana_sprint_base import (
    SanaSprintPipelineBase,
    count_steps,
    denoise_trigflow,
    lay_out_angles,
)
from diffusers_sana.pipelines.request import Request, check_strength
from diffusers_sana.prompts.encoding import encode_prompts
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION
from diffusers_sana.schedulers.trigflow import mix


class SanaSprintImg2ImgPipeline(SanaSprintPipelineBase):
    """An image and a prompt to an image, with SANA-Sprint (arXiv 2503.09641).

    A drop-in for `diffusers.SanaSprintImg2ImgPipeline`, with the components of `SanaSprintPipeline`:
    `SanaSprintImg2ImgPipeline.from_pipe(pipe)` shares them. Any number of steps works without further arguments.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, in bf16 or fp32: Gemma overflows fp16.
        vae: deep compression autoencoder in bf16 or fp32; encodes the image too.
        transformer: denoiser with a guidance embedding.
        scheduler: `diffusers.SCMScheduler`.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 2,
        timesteps: Sequence[float] | None = None,
        max_timesteps: float | None = 1.57080,
        intermediate_timesteps: float | None = 1.3,
        guidance_scale: float = 4.5,
        image: PipelineImageInput | None = None,
        strength: float = 0.6,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clean_caption: bool = False,
        use_resolution_binning: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 300,
        complex_human_instruction: str | Sequence[str] | None = COMPLEX_HUMAN_INSTRUCTION,
        *,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
    ) -> SanaPipelineOutput | tuple:
        """Changes images.

        Args:
            image: one for all prompts, or one each: whatever diffusers' image processor takes; tensors `[3, H, W]` and
                `[N, 3, H, W]` are in [0, 1]. Or latents `[N, C, h, w]`, as `output_type="latent"` gives them. Images
                are stretched to the size that is generated, as diffusers does.
            strength: in (0, 1]: the fraction of the steps that is run, rounded up. Of two steps, any strength above
                0.5 runs both, and the first of all steps begins with noise alone.
            height, width: pixels; by default those of the image.
            latents: to begin with, `[B, C, h, w]`, already mixed and scaled; the image then only sets the size.
            the others: as in `SanaSprintPipeline`.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        # 1. The request and the images, checked; the size asked for and the size that is generated
        request = Request.collect(locals(), has_vae=self.vae is not None)
        angles = timesteps, max_timesteps, intermediate_timesteps
        num_steps = count_steps(self.transformer, self.scheduler, num_inference_steps, *angles)
        begin = first_step(strength, num_steps)
        start = self._read_start(image, request, cover=False)
        requested_size, size = self._sizes_with_image(request, start)
        request = request.for_images(len(start.values))
        self._check(request, size)

        device = self._execution_device
        with self._begin(request) as call:
            # 2. Text features, [B, L, width]; keys and values of image prompts
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)
            num_images, sigma = len(texts["prompt_embeds"]), call.scheduler.config.sigma_data
            texts["image_states"] = self._image_states(request, num_images)

            # 3. Schedule, and the image under noise, [B, C, h, w] in fp32
            steps = lay_out_angles(call.scheduler, num_steps, *angles, device, begin)
            initial = self._noise(request, num_images, size)
            if latents is None:
                counts = num_images // num_images_per_prompt, num_images_per_prompt
                clean = for_each_output("image", self._encode_start(start, image, size) * sigma, *counts)
                initial = mix(clean, initial * sigma, steps[:1])

            # 4. Denoising: the transformer predicts, the scheduler steps to the image and back into noise
            latents = denoise_trigflow(self.transformer, initial, steps, texts, call)

            # 5. Images
            return self._output(latents, requested_size, request)

    def _sizes_with_image(self, request: Request, start: StartImage) -> tuple[Size, Size]:
        """The size asked for, by default that of the image, and the size to generate at."""
        if start.is_latents or not request.is_sized:
            is_binned = request.use_resolution_binning and not start.is_latents
            request = replace(request, height=start.size[0], width=start.size[1], use_resolution_binning=is_binned)
        return self._sizes(request)

    def _encode_start(self, start: StartImage, image: Any, size: Size) -> Tensor:
        """The latents `[N, C, h, w]` of the images, of standard deviation 1."""
        device = self._execution_device
        if start.is_latents:
            return start.values.to(device)
        return encode_images(self.vae, stretch(image, size, self.image_processor).to(device) * 2 - 1)


def stretch(image: Any, size: tuple[int, int], image_processor: VaeImageProcessor) -> Tensor:
    """Images `[N, 3, height, width]` in [0, 1], resized as diffusers does.

    Args:
        image: as in `SanaSprintImg2ImgPipeline`.
        size: height and width.
        image_processor: of the pipeline; resizes PIL images.
    """
    items = image if isinstance(image, list | tuple) else [image]
    if all(isinstance(item, Image.Image) for item in items):
        return read_images("image", [image_processor.resize(to_rgb(item), *size) for item in items])
    images = read_images("image", image)
    return images if images.shape[-2:] == size else F.interpolate(images, size=size, mode="bilinear")


def first_step(strength: float, num_steps: int) -> int:
    """How many steps `strength` leaves out."""
    check_strength(strength)
    return int(num_steps - num_steps * strength)
