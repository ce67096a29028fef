"""Inpainting with Sana and a control image.

Legend: B outputs (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from torch import Tensor

from diffusers_sana.pipelines.conditioning import check_strength_of_steps, lay_out_steps, mix_noise
from diffusers_sana.pipelines.controlnet_conditioning import cut_control
from diffusers_sana.pipelines.inpainting import keep_the_rest
from diffusers_sana.pipelines.pipeline_sana_controlnet import SanaControlNetPipeline
from diffusers_sana.pipelines.pipeline_sana_inpaint import SanaInpaintPipeline
from diffusers_sana.pipelines.request import Request
from diffusers_sana.pipelines.sampling import denoise
from diffusers_sana.prompts.encoding import encode_prompts
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION


class SanaControlNetInpaintPipeline(SanaControlNetPipeline, SanaInpaintPipeline):
    """Repaints the masked part of an image along a control image: `SanaInpaintPipeline` steered by a ControlNet.

    Args:
        controlnet: trained for this transformer (arXiv 2302.05543); or a list of several, which steer together.
        the others: as in `SanaInpaintPipeline`.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        control_image: PipelineImageInput | None = None,
        strength: float = 1.0,
        *,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        padding_mask_crop: int | None = None,
        preserve_unmasked: bool = True,
        num_images_per_prompt: int = 1,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 20,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.5,
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
        guider: Any = None,
        share_prompt_mask: bool = False,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
    ) -> SanaPipelineOutput | tuple:
        """Repaints images along a control image.

        Args:
            control_image: as in `SanaControlNetPipeline`, of the whole image: PIL images and arrays are stretched to
                its size and cut as it is. A tensor in [-1, 1] is used as it is: it must show the part that is
                generated, at the size of generation.
            controlnet_conditioning_scale: as in `SanaControlNetPipeline`.
            control_guidance_start, control_guidance_end: the fractions of the steps that are run after which the
                control begins and ends.
            the others: as in `SanaInpaintPipeline`.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        # 1. The request, images, masks and control images, checked; the part that is generated, and its size
        request = Request.collect(locals(), has_vae=self.vae is not None)
        control = self._control(
            control_image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end
        )
        check_strength_of_steps(strength, num_inference_steps, timesteps, sigmas)
        repainting = self._read_repainting(image, mask_image, padding_mask_crop, request)
        size = self._generated_size(repainting.part, request, is_chosen=request.is_sized and padding_mask_crop is None)
        request = request.for_images(repainting.num_images)
        self._check(request, size)
        control_image = cut_control(self.controlnet, control_image, repainting, size)

        device = self._execution_device
        with self._begin(request) as call:
            # 2. Text features, [B, L, width], image prompts, and control latents, [B, C, h, w]
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)
            num_images = len(texts["prompt_embeds"])
            texts["image_states"] = self._image_states(request, num_images)
            counts = num_images // num_images_per_prompt, num_images_per_prompt
            texts["control_image"] = self._encode_control(control_image, size, *counts)

            # 3. Schedule, noise, image and mask, [B, C, h, w] in fp32
            steps, levels = lay_out_steps(call.scheduler, strength, num_inference_steps, timesteps, sigmas, device)
            noise = self._noise(request, num_images, size)
            image_latents = repainting.part.encode(self.vae, size, *counts, device)
            repainted = repainting.cells(size, (noise.shape[-2], noise.shape[-1]), counts, device)

            # 4. Denoising with the outputs of the ControlNet; what is not repainted is the image at the noise level
            predict = control.predictor(texts, len(steps))
            rest = keep_the_rest(repainted, image_latents, noise, levels)
            latents = mix_noise(image_latents, noise, levels[0])
            latents = denoise(self.transformer, latents, steps, texts, call, predict=predict, after_step=rest)

            # 5. Images: the generated part, put into the images as they were
            return self._repainted(latents, repainting, counts, preserve_unmasked, request)
