"""Image-to-image with SANA-Sprint, in one to four steps.

Legend: B outputs (prompts times images per prompt), N images given, C latent channels, h w latent height and width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.images import to_rgb
from diffusers_sana.pipelines.conditioning import for_each_output, read_images
from diffusers_sana.pipelines.decoding import encode_images
from diffusers_sana.pipelines.pipeline_sana_sprint_base import TrigFlowBase
from diffusers_sana.pipelines.request import check_latents, check_options, check_strength
from diffusers_sana.prompts.encoding import COMPLEX_HUMAN_INSTRUCTION


class SanaSprintImg2ImgPipeline(TrigFlowBase):
    """An image and a prompt to an image, with SANA-Sprint (arXiv 2503.09641).

    A drop-in for `diffusers.SanaSprintImg2ImgPipeline`, with the components of `SanaSprintPipeline`:
    `SanaSprintImg2ImgPipeline.from_pipe(pipe)` shares them. Any number of steps works as it is.

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
    ) -> SanaPipelineOutput | tuple:
        """Changes images.

        Args:
            image: one for all prompts, or one each: whatever diffusers' image processor takes; tensors `[3, H, W]` and
                `[N, 3, H, W]` are in [0, 1]. Or latents `[N, C, h, w]`, as `output_type="latent"` gives them. Images
                are stretched to the size that is generated, as diffusers does.
            strength: in (0, 1]: the share of the steps that is run, rounded up. Of two steps, any strength above 0.5
                runs both, and the first of all steps begins with noise alone.
            height, width: pixels; by default those of the image.
            latents: to begin with, `[B, C, h, w]`, mixed and scaled already; the image then only gives the size.
            the others: as in `SanaSprintPipeline`.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Steps, images, sizes, and all that can be wrong
        num_steps = self._check_schedule(num_inference_steps, timesteps, max_timesteps, intermediate_timesteps)
        check_options(
            guidance_scale=guidance_scale,
            eta=eta,
            attention_kwargs=attention_kwargs,
            timesteps=None,
            sigmas=None,
            output_type=output_type,
            has_vae=self.vae is not None,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
        )
        begin = _first_step(strength, num_steps)
        if latents is not None:
            check_latents(latents)
        images = self._read_image(image, height, width)
        if self._is_latents(images):
            height, width = (side * self.vae_scale_factor for side in images.shape[-2:])
            use_resolution_binning = False
        elif (height, width) == (None, None):
            height, width = images.shape[-2:]
        requested_size, size = self._sizes(height, width, use_resolution_binning)
        if isinstance(prompt, str):
            prompt = [prompt] * len(images)

        # 2. Texts, [B, L, width]
        tensors = self._start(
            prompt,
            size,
            callback_on_step_end_tensor_inputs,
            guidance_scale=guidance_scale,
            attention_kwargs=attention_kwargs,
            num_images_per_prompt=num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            clean_caption=clean_caption,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=complex_human_instruction,
        )

        # 3. Schedule, noise and image, [B, C, h, w] in fp32
        angles = self._lay_out(num_steps, timesteps, max_timesteps, intermediate_timesteps, begin)
        num_outputs, channels = len(tensors["prompt_embeds"]), self.transformer.config.in_channels
        device, sigma = self._execution_device, self.scheduler.config.sigma_data
        given = latents
        latents = self.prepare_latents(num_outputs, channels, *size, torch.float32, device, generator, given)
        if given is None:
            if not self._is_latents(images):
                images = encode_images(self.vae, self._stretched(image, size).to(device) * 2 - 1)
            images = images.to(device) * sigma
            images = for_each_output("image", images, num_outputs // num_images_per_prompt, num_images_per_prompt)
            latents = angles[0].cos() * images + angles[0].sin() * (latents * sigma)

        # 4. Denoising, and images
        latents = self._denoise(
            latents,
            angles,
            tensors,
            eta=eta,
            generator=generator,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        return self._output(latents, requested_size, output_type, return_dict)

    def _is_latents(self, image: Any) -> bool:
        return isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == self.transformer.config.in_channels

    def _read_image(self, image: Any, height: int | None, width: int | None) -> Tensor:
        """The images of a call `[N, 3, H, W]` in [0, 1], or the latents `[N, C, h, w]`; checked."""
        if image is None:
            raise ValueError("`image` must be given, got None. Use SanaSprintPipeline to draw without one.")
        if self._is_latents(image):
            check_latents(image, "image")
            if (height, width) != (None, None):
                raise ValueError("`height` and `width` must be left out where `image` is latents, which have a size.")
            return image.float()
        if self.vae is None:
            raise ValueError("`image` must be latents, because this pipeline was made without an autoencoder.")
        return read_images("image", image)

    def _stretched(self, image: Any, size: tuple[int, int]) -> Tensor:
        """Images `[N, 3, height, width]` in [0, 1], resized as diffusers does."""
        items = image if isinstance(image, list | tuple) else [image]
        if all(isinstance(item, Image.Image) for item in items):
            return read_images("image", [self.image_processor.resize(to_rgb(item), *size) for item in items])
        images = read_images("image", image)
        return images if images.shape[-2:] == size else F.interpolate(images, size=size, mode="bilinear")


def _first_step(strength: float, num_steps: int) -> int:
    """How many steps `strength` leaves out."""
    check_strength(strength)
    return int(num_steps - num_steps * strength)
