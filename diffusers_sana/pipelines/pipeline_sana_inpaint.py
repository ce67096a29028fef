"""Inpainting with Sana and SANA-1.5.

Legend: B outputs (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from torch import Tensor

from diffusers_sana.images import check_masks
from diffusers_sana.pipelines.conditioning import for_each_output, read_images
from diffusers_sana.pipelines.image_start import ImageStart, check_strength_of_steps, mix_noise
from diffusers_sana.pipelines.inpainting import fit_masks, mask_cells, masked_region, put_back
from diffusers_sana.pipelines.pipeline_sana_base import SanaPipelineBase
from diffusers_sana.pipelines.request import check_latents, check_options
from diffusers_sana.pipelines.resolution import resize_and_crop
from diffusers_sana.prompts.encoding import COMPLEX_HUMAN_INSTRUCTION


class SanaInpaintPipeline(ImageStart, SanaPipelineBase):
    """Repaints the masked part of an image, with Sana (arXiv 2410.10629) and SANA-1.5 (arXiv 2501.18427).

    After each step, latent cells without a masked pixel are put back to those of the image, at the noise level of the
    step (RePaint, arXiv 2201.09865, without its resampling). A cell is 32 pixels wide, so that alone would repaint
    around the mask too: in the end, unmasked pixels are put back as well. Components are those of `SanaPipeline`:
    `SanaInpaintPipeline.from_pipe(pipe)` shares them.

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
        mask_image: PipelineImageInput | None = None,
        strength: float = 1.0,
        padding_mask_crop: int | None = None,
        preserve_unmasked: bool = True,
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
        """Repaints images.

        Args:
            prompt: one or several texts; one serves all images. It describes the whole image, not only the new part.
            image: as in `SanaImg2ImgPipeline`.
            mask_image: one for all prompts, or one each, of any size in the proportions of the image: PIL images,
                arrays `[H, W]` and tensors `[H, W]` in [0, 1], lists and batches of them; integers may be 0 and 1,
                8 or 16 bits. White is repainted; gray mixes old and new pixels, and counts as white from 0.5 on while
                the latents are made. A mask in which nothing is white is warned about.
            strength: in (0, 1]: the share of the steps that is run; below 1 what was under the mask shows through.
            padding_mask_crop: draw only the surroundings of the masked part, so many pixels wide, at the full size of
                the checkpoint, and put them back: for small parts of large images. None draws all of the image.
            preserve_unmasked: put unmasked pixels back as they were, exactly. False shows what the autoencoder made
                of them, without a seam at the border of the mask. Not with latents as `image` or as the output.
            height, width, use_resolution_binning: as in `SanaImg2ImgPipeline`.
            latents: the noise, `[B, C, h, w]`, of the part that is drawn, in place of what `generator` gives.
            the others: as in `SanaPipeline`.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Images, masks, sizes, and all that can be wrong
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
        images, masks, rows, columns = self._read_masked(image, mask_image, height, width, padding_mask_crop)
        part = images if self.is_latents(images) else images[..., rows, columns]
        is_chosen = (height, width) != (None, None) and padding_mask_crop is None
        size = self._generated_size(part, latents, is_chosen, use_resolution_binning)
        if isinstance(prompt, str):
            prompt = [prompt] * max(len(images), len(masks))

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

        # 3. Schedule, noise, image and mask, [B, C, h, w] in fp32
        num_outputs = len(tensors["prompt_embeds"])
        counts = num_outputs // num_images_per_prompt, num_images_per_prompt
        channels, device = self.transformer.config.in_channels, self._execution_device
        steps_left, levels = self._schedule(num_inference_steps, timesteps, sigmas, strength)
        noise = self.prepare_latents(num_outputs, channels, *size, torch.float32, device, generator, latents)
        image_latents = self._image_latents(part, size, *counts)
        masks = for_each_output("mask_image", masks.to(device), *counts)
        repainted = mask_cells(masks[..., rows, columns], size, (noise.shape[-2], noise.shape[-1]))

        # 4. Denoising, and images
        def keep_the_rest(step: int, latents: Tensor) -> Tensor:
            return torch.where(repainted, latents, mix_noise(image_latents, noise, levels[step + 1]))

        latents = self._denoise(
            mix_noise(image_latents, noise, levels[0]),
            steps_left,
            tensors,
            after_step=keep_the_rest,
            eta=eta,
            generator=generator,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        if output_type == "latent" or self.is_latents(images):
            return self._output(latents, self._size_of(images), output_type, return_dict)
        drawn = resize_and_crop(self._decode(latents).float(), *self._size_of(part))
        drawn = (drawn / 2 + 0.5).clamp(0, 1)
        whole = for_each_output("image", images.to(device), *counts).clone()
        if preserve_unmasked:
            drawn = put_back(drawn, whole[..., rows, columns], masks[..., rows, columns])
        whole[..., rows, columns] = drawn
        result = self.image_processor.postprocess(whole, output_type, do_denormalize=[False] * len(whole))
        self.maybe_free_model_hooks()
        return SanaPipelineOutput(images=result) if return_dict else (result,)

    def _read_masked(
        self, image: Any, mask_image: Any, height: int | None, width: int | None, padding_mask_crop: int | None
    ) -> tuple[Tensor, Tensor, slice, slice]:
        """Images or latents as `_read_image`, masks `[N, 1, height, width]`, rows and columns of the part to draw."""
        images = self._read_image(image, height, width)
        if mask_image is None:
            raise ValueError("`mask_image` must be given, got None. Use SanaImg2ImgPipeline to change all of `image`.")
        masks = read_images("mask_image", mask_image, channels=1)
        check_masks("mask_image", masks)
        whole = images if (height, width) == (None, None) else self._read_image(image, None, None)
        masks = fit_masks(masks, self._size_of(images), self._size_of(whole))
        if padding_mask_crop is None:
            return images, masks, slice(None), slice(None)
        if not isinstance(padding_mask_crop, Integral):
            raise TypeError(f"`padding_mask_crop` must be an integer or None, got {padding_mask_crop!r}.")
        if padding_mask_crop < 0 or self.is_latents(images):
            raise ValueError(f"`padding_mask_crop` must be at least 0, and None for latents, got {padding_mask_crop}.")
        return images, masks, *masked_region(masks, int(padding_mask_crop))
