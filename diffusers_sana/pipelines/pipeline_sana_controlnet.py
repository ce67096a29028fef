"""Text-to-image with Sana and a control image.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as UpstreamAutoencoderDC
from diffusers.models.controlnets.controlnet_sana import SanaControlNetModel as UpstreamControlNet
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel as UpstreamTransformer
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.pipelines.sana.pipeline_sana import retrieve_timesteps
from diffusers.schedulers import SchedulerMixin
from torch import Tensor
from transformers import Gemma2PreTrainedModel, GemmaTokenizer

from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.controlnets.controlnet_sana import SanaControlNetModel
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.pipelines.controlnet_conditioning import ControlNetConditioning
from diffusers_sana.pipelines.pipeline_sana_base import SanaPipelineBase
from diffusers_sana.pipelines.request import check_latents, check_options
from diffusers_sana.prompts.encoding import COMPLEX_HUMAN_INSTRUCTION


class SanaControlNetPipeline(ControlNetConditioning, SanaPipelineBase):
    """Text to image with Sana (arXiv 2410.10629) and a ControlNet (arXiv 2302.05543) that sees a control image.

    A drop-in for `diffusers.SanaControlNetPipeline`: the same components, arguments, seeds and folders. Beyond it,
    ControlNets may have `wiring="nvlabs"`, may be compiled, and may steer only a part of the steps.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, in bf16 or fp32: Gemma overflows fp16.
        vae: deep compression autoencoder in bf16 or fp32; encodes the control image too.
        transformer: denoiser.
        controlnet: trained for this transformer.
        scheduler: solver of the flow; any diffusers scheduler for flow prediction.
    """

    model_cpu_offload_seq = "text_encoder->controlnet->transformer->vae"  # type: ignore[assignment]
    _callback_tensor_inputs = ["latents", "control_image", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        text_encoder: Gemma2PreTrainedModel,
        vae: AutoencoderDC | UpstreamAutoencoderDC,
        transformer: SanaTransformer2DModel | UpstreamTransformer,
        controlnet: SanaControlNetModel | UpstreamControlNet,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_modules(controlnet=controlnet)
        self._warn_of_unused_outputs()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 20,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.5,
        control_image: PipelineImageInput | None = None,
        controlnet_conditioning_scale: float = 1.0,
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
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
    ) -> SanaPipelineOutput | tuple:
        """Generates images that follow a control image.

        Args:
            control_image: what the ControlNet was trained to follow, such as edges: one for all prompts, or one each.
                Pictures and arrays are resized to the size of generation. A tensor `[images, 3, height, width]` in
                [-1, 1] is used as it is, and images of its size are generated.
            controlnet_conditioning_scale: strength of the control.
            control_guidance_start, control_guidance_end: the shares of the steps after which the control begins and
                ends.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in `SanaPipeline`, and `control_image`, the
                latents `[B, C, h, w]` of the control image.
            the others: as in `SanaPipeline`; `attention_kwargs` also reach the ControlNet.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Sizes, and all that can be wrong
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
        self._check_control(control_image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end)
        requested = height, width
        if latents is not None:
            check_latents(latents)
            if height is None and width is None:
                height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
                use_resolution_binning = False
        if isinstance(control_image, Tensor):
            sides = height, width = control_image.shape[-2], control_image.shape[-1]
            requested_size = (requested[0] or sides[0], requested[1] or sides[1]) if use_resolution_binning else sides
        else:
            requested_size, (height, width) = self._sizes(height, width, use_resolution_binning)

        # 2. Texts, [B, L, width], and control latents, [B, C, h, w]
        tensors = self._start(
            prompt,
            (height, width),
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
        num_images = len(tensors["prompt_embeds"])
        tensors["control_image"] = self._encode_control(
            control_image, height, width, num_images // num_images_per_prompt, num_images_per_prompt
        )

        # 3. Schedule and noise, [B, C, h, w] in fp32
        device = self._execution_device
        steps, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        channels = self.transformer.config.in_channels
        latents = self.prepare_latents(num_images, channels, height, width, torch.float32, device, generator, latents)

        # 4. Denoising, and images
        steering = (controlnet_conditioning_scale, control_guidance_start, control_guidance_end)
        latents = self._denoise(
            latents,
            steps,
            tensors,
            predict=self._controlled(tensors, len(steps), *steering),
            eta=eta,
            generator=generator,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        return self._output(latents, requested_size, output_type, return_dict)
