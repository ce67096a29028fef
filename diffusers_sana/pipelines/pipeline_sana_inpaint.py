"""Inpainting with Sana and SANA-1.5.

Legend: B outputs (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from torch import Tensor

from diffusers_sana.pipelines.conditioning import check_strength_of_steps, lay_out_steps, mix_noise
from diffusers_sana.pipelines.image_prompts import ImagePromptPipeline
from diffusers_sana.pipelines.inpainting import Repainting, keep_the_rest
from diffusers_sana.pipelines.pipeline_sana_base import ImageSanaPipeline
from diffusers_sana.pipelines.request import Request
from diffusers_sana.pipelines.sampling import denoise
from diffusers_sana.prompts.encoding import encode_prompts
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION


class SanaInpaintPipeline(ImagePromptPipeline, ImageSanaPipeline):
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
        *,
        guider: Any = None,
        share_prompt_mask: bool = False,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
    ) -> SanaPipelineOutput | tuple:
        """Repaints images.

        Args:
            prompt: one or several texts; one serves all images. It describes the whole image, not only the new part.
            image: as in `SanaImg2ImgPipeline`.
            mask_image: one for all prompts, or one each, of any size in the proportions of the image: PIL images,
                arrays `[H, W]` and tensors `[H, W]` in [0, 1], lists and batches of them; integers may be 0 and 1,
                8 or 16 bits. White is repainted; gray mixes old and new pixels, and counts as white from 0.5 on while
                the latents are made. A mask in which nothing is white is warned about.
            strength: in (0, 1]: the fraction of the steps that is run; below 1 what was under the mask shows through.
            padding_mask_crop: generate only the masked part and so many pixels around it, at the full size of the
                checkpoint, and put them back: for small parts of large images. None generates all of the image.
            preserve_unmasked: put unmasked pixels back as they were, exactly. False shows what the autoencoder made
                of them, without a seam at the border of the mask. Not with latents as `image` or as the output.
            height, width, use_resolution_binning: as in `SanaImg2ImgPipeline`.
            latents: the noise, `[B, C, h, w]`, of the part that is generated, in place of what `generator` gives.
            the others: as in `SanaPipeline`.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        # 1. The request, images and masks, checked; the part that is generated, and its size
        request = Request.collect(locals(), has_vae=self.vae is not None)
        check_strength_of_steps(strength, num_inference_steps, timesteps, sigmas)
        repainting = self._read_repainting(image, mask_image, padding_mask_crop, request)
        size = self._generated_size(repainting.part, request, is_chosen=request.is_sized and padding_mask_crop is None)
        request = request.for_images(repainting.num_images)
        self._check(request, size)

        device = self._execution_device
        with self._begin(request) as call:
            # 2. Text features, [B, L, width], of prompts and negative prompts; keys and values of image prompts
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)
            num_images = len(texts["prompt_embeds"])
            texts["image_states"] = self._image_states(request, num_images)

            # 3. Schedule, noise, image and mask, [B, C, h, w] in fp32
            steps, levels = lay_out_steps(call.scheduler, strength, num_inference_steps, timesteps, sigmas, device)
            noise = self._noise(request, num_images, size)
            counts = num_images // num_images_per_prompt, num_images_per_prompt
            image_latents = repainting.part.encode(self.vae, size, *counts, device)
            repainted = repainting.cells(size, (noise.shape[-2], noise.shape[-1]), counts, device)

            # 4. Denoising; after each step, what is not repainted is the image at the noise level of the step
            rest = keep_the_rest(repainted, image_latents, noise, levels)
            latents = mix_noise(image_latents, noise, levels[0])
            latents = denoise(self.transformer, latents, steps, texts, call, after_step=rest)

            # 5. Images: the generated part, put into the images as they were
            return self._repainted(latents, repainting, counts, preserve_unmasked, request)

    def _read_repainting(
        self, image: Any, mask_image: Any, padding_mask_crop: int | None, request: Request
    ) -> Repainting:
        """The images and masks of a call, checked."""
        start = self._read_start(image, request)
        uncut = self._read_start(image, replace(request, height=None, width=None)) if request.is_sized else start
        return Repainting.read(start, mask_image, padding_mask_crop, uncut.size)

    def _repainted(
        self,
        latents: Tensor,
        repainting: Repainting,
        counts: tuple[int, int],
        preserve_unmasked: bool,
        request: Request,
    ) -> Any:
        """What `__call__` returns for the latents of the generated part."""
        if request.output_type == "latent" or repainting.start.is_latents:
            return self._output(latents, repainting.start.size, request)
        whole = repainting.put_into_images(self._decode(latents), counts, preserve_unmasked)
        result = self.image_processor.postprocess(whole, request.output_type, do_denormalize=[False] * len(whole))
        self.maybe_free_model_hooks()
        return SanaPipelineOutput(images=result) if request.return_dict else (result,)
