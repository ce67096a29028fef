"""Text-to-image with SANA-Sprint and a control image, in one to four steps.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from torch import Tensor

from diffusers_sana.pipelines.pipeline_sana_controlnet import ControlledSanaPipeline
from diffusers_sana.pipelines.pipeline_sana_sprint_base import (
    SanaSprintPipelineBase,
    count_steps,
    denoise_trigflow,
    lay_out_angles,
)
from diffusers_sana.pipelines.request import Request
from diffusers_sana.prompts.encoding import encode_prompts
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION


class SanaSprintControlNetPipeline(ControlledSanaPipeline, SanaSprintPipelineBase):
    """Text to image with SANA-Sprint (arXiv 2503.09641) and a ControlNet (arXiv 2302.05543) that sees a control image.

    The ControlNet is that of the teacher, a Sana or SANA-1.5, whose blocks the student has. It gets the noise level of
    each step as the teacher's timestep.

    Args:
        controlnet: trained for the teacher; or a list of several, which steer together.
        the others: as in `SanaSprintPipeline`.
    """

    _callback_tensor_inputs = ["latents", "control_image", "prompt_embeds"]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 2,
        timesteps: Sequence[float] | None = None,
        max_timesteps: float | None = 1.57080,
        intermediate_timesteps: float | None = 1.3,
        guidance_scale: float = 4.5,
        control_image: PipelineImageInput | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
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
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        *,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
    ) -> SanaPipelineOutput | tuple:
        """Generates images that follow a control image.

        Args:
            control_image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end: as in
                `SanaControlNetPipeline`.
            callback_on_step_end_tensor_inputs: as in `SanaSprintPipeline`, and `control_image`.
            the others: as in `SanaSprintPipeline`; `attention_kwargs` also reach the ControlNet.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        # 1. The request and the control image, checked; the size asked for and the size that is generated
        request = Request.collect(locals(), has_vae=self.vae is not None)
        control = self._control(
            control_image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end
        )
        angles = timesteps, max_timesteps, intermediate_timesteps
        num_steps = count_steps(self.transformer, self.scheduler, num_inference_steps, *angles)
        requested_size, size = self._controlled_sizes(control_image, request)
        self._check(request, size)

        device = self._execution_device
        with self._begin(request) as call:
            # 2. Text features, [B, L, width], image prompts, and control latents, [B, C, h, w]
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)
            num_images = len(texts["prompt_embeds"])
            texts["image_states"] = self._image_states(request, num_images)
            counts = num_images // num_images_per_prompt, num_images_per_prompt
            texts["control_image"] = self._encode_control(control_image, size, *counts)

            # 3. Schedule and noise, [B, C, h, w] in fp32
            steps = lay_out_angles(call.scheduler, num_steps, *angles, device)
            noise = self._noise(request, num_images, size)

            # 4. Denoising; in each step the transformer also gets the outputs of the ControlNet
            residuals = control.residuals(texts, len(steps))
            latents = noise * call.scheduler.config.sigma_data
            latents = denoise_trigflow(self.transformer, latents, steps, texts, call, residuals)

            # 5. Images
            return self._output(latents, requested_size, request)
