"""Text-to-image with SANA-Sprint, in one to four steps.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from torch import Tensor

from diffusers_sana.pipelines.pipeline_sana_sprint_base import (
    SanaSprintPipelineBase,
    count_steps,
    denoise_trigflow,
    lay_out_angles,
)
from diffusers_sana.pipelines.request import Request
from diffusers_sana.prompts.encoding import encode_prompts
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION


class SanaSprintPipeline(SanaSprintPipelineBase):
    """Text to image with SANA-Sprint (arXiv 2503.09641).

    A drop-in for `diffusers.SanaSprintPipeline`: the same components, arguments, seeds and folders. Any number of
    steps works without further arguments, and so does a custom schedule.

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
        *,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
    ) -> SanaPipelineOutput | tuple:
        """Generates images.

        Args:
            prompt: one or several texts.
            num_inference_steps: evaluations of the transformer; trained for 1 to 4.
            timesteps: custom angles in radians: descending, the last one 0, one more than there are steps. The
                paper's for four steps are `[1.5683, 1.3, 1.1, 0.6, 0.0]`.
            max_timesteps: the first angle, where `timesteps` is None.
            intermediate_timesteps: the second angle of two steps; None, and any other number of steps, divides the
                range from `max_timesteps` to 0 evenly.
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
        # 1. The request, checked; the size asked for and the size that is generated
        request = Request.collect(locals(), has_vae=self.vae is not None)
        angles = timesteps, max_timesteps, intermediate_timesteps
        num_steps = count_steps(self.transformer, self.scheduler, num_inference_steps, *angles)
        requested_size, size = self._sizes(request)
        self._check(request, size)

        device = self._execution_device
        with self._begin(request) as call:
            # 2. Text features, [B, L, width]; keys and values of image prompts
            texts = encode_prompts(self.tokenizer, self.text_encoder, request, is_guided=call.is_guided, device=device)
            texts["image_states"] = self._image_states(request, len(texts["prompt_embeds"]))

            # 3. Schedule and noise, [B, C, h, w] in fp32
            steps = lay_out_angles(call.scheduler, num_steps, *angles, device)
            noise = self._noise(request, len(texts["prompt_embeds"]), size)

            # 4. Denoising: the transformer predicts, the scheduler steps to the image and back into noise
            latents = noise * call.scheduler.config.sigma_data
            latents = denoise_trigflow(self.transformer, latents, steps, texts, call)

            # 5. Images
            return self._output(latents, requested_size, request)
