"""Image-to-image with Sana and SANA-1.5.

Legend: B outputs (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from torch import Tensor

from diffusers_sana.pipelines.image_start import ImageStart, check_strength_of_steps, mix_noise
from diffusers_sana.pipelines.pipeline_sana_base import SanaPipelineBase
from diffusers_sana.pipelines.request import check_latents, check_options
from diffusers_sana.prompts.encoding import COMPLEX_HUMAN_INSTRUCTION


class SanaImg2ImgPipeline(ImageStart, SanaPipelineBase):
    """An image and a prompt to an image, with Sana (arXiv 2410.10629) and SANA-1.5 (arXiv 2501.18427), by SDEdit.

    The image is mixed with noise and denoised under the prompt (arXiv 2108.01073). Components are those of
    `SanaPipeline`: `SanaImg2ImgPipeline.from_pipe(pipe)` shares them.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, in bf16 or fp32: Gemma overflows fp16.
        vae: deep compression autoencoder in bf16 or fp32; encodes the image too.
        transformer: denoiser.
        scheduler: solver of the flow; any diffusers scheduler for flow prediction.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.6,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 20,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
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
        complex_human_instruction: str | Sequence[str] | None = COMPLEX_HUMAN_INSTRUCTION,
    ) -> SanaPipelineOutput | tuple:
        """Changes images.

        Args:
            prompt: one or several texts; one serves all images.
            image: one for all prompts, or one each: PIL images, arrays `[H, W, 3]` and tensors `[3, H, W]` in [0, 1],
                lists and batches of them; or latents `[images, C, h, w]`, as `output_type="latent"` gives them.
            strength: in (0, 1]: the share of the steps that is run, and so how far the result may go from the image.
                At 1 the image leaves no trace, and the result is that of `SanaPipeline`.
            num_inference_steps: of the whole schedule; `strength` times as many evaluations of the transformer.
            height, width: pixels; those of the image by default. Images of other proportions are cut.
            latents: the noise, `[B, C, h, w]`, in place of what `generator` gives.
            use_resolution_binning: generate at the trained size of the nearest aspect ratio, or without a table of
                trained sizes at the native area, unless `height` or `width` is given; and scale the result to the size
                asked for. The borders of the image are repeated as far as the ratios differ, and cut again.
            the others: as in `SanaPipeline`.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Images, sizes, and all that can be wrong
        check_options(
            guidance_scale=guidance_scale,
            eta=eta,
            attention_kwargs=attention_kwargs,
            timesteps=timesteps,
            sigmas=sigmas,
            output_type=output_type,
            has_vae=self.vae is not None,
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
        )
        check_strength_of_steps(strength, num_inference_steps, timesteps, sigmas)
        if latents is not None:
            check_latents(latents)
        images = self._read_image(image, height, width)
        is_chosen = (height, width) != (None, None)
        size = self._generated_size(images, latents, is_chosen, use_resolution_binning)
        if isinstance(prompt, str):
            prompt = [prompt] * len(images)

        # 2. Texts, [B, L, width]
        tensors = self._start(
            prompt,
            size,
            callback_on_step_end_tensor_inputs,
            guidance_scale=guidance_scale,
            attention_kwargs=attention_kwargs,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            clean_caption=clean_caption,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=complex_human_instruction,
        )

        # 3. Schedule, noise and image, [B, C, h, w] in fp32
        num_outputs = len(tensors["prompt_embeds"])
        channels, device = self.transformer.config.in_channels, self._execution_device
        steps_left, levels = self._schedule(num_inference_steps, timesteps, sigmas, strength)
        noise = self.prepare_latents(num_outputs, channels, *size, torch.float32, device, generator, latents)
        image_latents = self._image_latents(images, size, num_outputs // num_images_per_prompt, num_images_per_prompt)

        # 4. Denoising, and images
        latents = self._denoise(
            mix_noise(image_latents, noise, levels[0]),
            steps_left,
            tensors,
            eta=eta,
            generator=generator,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        return self._output(latents, self._size_of(images), output_type, return_dict)
