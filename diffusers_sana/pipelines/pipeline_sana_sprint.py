"""Text-to-image with SANA-Sprint, in one to four steps.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from torch import Tensor

from diffusers_sana.pipelines.pipeline_sana_sprint_base import TrigFlowBase
from diffusers_sana.pipelines.request import check_latents, check_options
from diffusers_sana.prompts.encoding import COMPLEX_HUMAN_INSTRUCTION


class SanaSprintPipeline(TrigFlowBase):
    """Text to image with SANA-Sprint (arXiv 2503.09641).

    A drop-in for `diffusers.SanaSprintPipeline`: the same components, arguments, seeds and folders. Any number of
    steps works as it is, and so does a schedule of one's own.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, in bf16 or fp32: Gemma overflows fp16.
        vae: deep compression autoencoder in bf16 or fp32.
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
        """Generates images.

        Args:
            prompt: one or several texts.
            num_inference_steps: evaluations of the transformer; trained for 1 to 4.
            timesteps: angles of one's own, in radians: descending, the last one 0, one more than there are steps. The
                paper's for four steps are `[1.5683, 1.3, 1.1, 0.6, 0.0]`.
            max_timesteps: the first angle, where `timesteps` is None.
            intermediate_timesteps: the second angle of two steps; None, and any other number of steps, divides the
                way from `max_timesteps` to 0 evenly.
            guidance_scale: an input of the model, so that any value costs the same.
            latents: noise of standard deviation 1 to begin with, `[B, C, h, w]`.
            eta: for schedulers that take it.
            callback_on_step_end_tensor_inputs: which of `latents` and `prompt_embeds` callbacks get. The latents have
                the scheduler's standard deviation, `sigma_data`.
            the others: as in `SanaPipeline`.

        Returns:
            `SanaPipelineOutput` with `images`, or a tuple with them.

        Raises:
            TypeError, ValueError: naming the argument, before anything is computed wherever possible.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Steps, sizes, and all that can be wrong
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
        if latents is not None:
            check_latents(latents)
            if height is None and width is None:
                height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
                use_resolution_binning = False
        requested_size, size = self._sizes(height, width, use_resolution_binning)

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

        # 3. Schedule and noise, [B, C, h, w] in fp32
        angles = self._lay_out(num_steps, timesteps, max_timesteps, intermediate_timesteps)
        num_outputs, channels = len(tensors["prompt_embeds"]), self.transformer.config.in_channels
        device = self._execution_device
        noise = self.prepare_latents(num_outputs, channels, *size, torch.float32, device, generator, latents)

        # 4. Denoising, and images
        latents = self._denoise(
            noise * self.scheduler.config.sigma_data,
            angles,
            tensors,
            eta=eta,
            generator=generator,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        return self._output(latents, requested_size, output_type, return_dict)
