"""Image-to-image with Sana and a control image.

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
from diffusers_sana.pipelines.pipeline_sana_controlnet import SanaControlNetPipeline
from diffusers_sana.pipelines.pipeline_sana_img2img import SanaImg2ImgPipeline
from diffusers_sana.pipelines.request import Request
from diffusers_sana.pipelines.sampling import denoise
from diffusers_sana.prompts.encoding import encode_prompts
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION


class SanaControlNetImg2ImgPipeline(SanaControlNetPipeline, SanaImg2ImgPipeline):
    """An image, a prompt and a control image to an image: `SanaImg2ImgPipeline` steered by a ControlNet.

    Args:
        controlnet: trained for this transformer (arXiv 2302.05543); or a list of several, which steer together.
        the others: as in `SanaImg2ImgPipeline`.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        control_image: PipelineImageInput | None = None,
        strength: float = 0.6,
        *,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
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
        """Changes images along a control image.

        Args:
            control_image, controlnet_conditioning_scale: as in `SanaControlNetPipeline`; a tensor must have the size
                of generation.
            control_guidance_start, control_guidance_end: the fractions of the steps that are run after which the
                control begins and ends.
            the others: as in `SanaImg2ImgPipeline`.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        # 1. The request, the images and the control image, checked; the size that is generated
        request = Request.collect(locals(), has_vae=self.vae is not None)
        control = self._control(
            control_image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end
        )
        check_strength_of_steps(strength, num_inference_steps, timesteps, sigmas)
        start = self._read_start(image, request)
        size = self._generated_size(start, request, is_chosen=request.is_sized)
        request = request.for_images(len(start.values))
        self._check(request, size)

        device = self._execution_device
        with self._begin(request) as call:
            # 2. Text features, [B, L, width], image prompts, and control latents, [B, C, h, w]
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)
            num_images = len(texts["prompt_embeds"])
            texts["image_states"] = self._image_states(request, num_images)
            counts = num_images // num_images_per_prompt, num_images_per_prompt
            texts["control_image"] = self._encode_control(control_image, size, *counts)

            # 3. Schedule, noise and image, [B, C, h, w] in fp32
            steps, levels = lay_out_steps(call.scheduler, strength, num_inference_steps, timesteps, sigmas, device)
            noise = self._noise(request, num_images, size)
            image_latents = start.encode(self.vae, size, *counts, device)

            # 4. Denoising, from the image under noise, with the outputs of the ControlNet
            predict = control.predictor(texts, len(steps))
            latents = mix_noise(image_latents, noise, levels[0])
            latents = denoise(self.transformer, latents, steps, texts, call, predict=predict)

            # 5. Images
            return self._output(latents, start.size, request)
