"""Text-to-image with Sana and SANA-1.5.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from diffusers.pipelines.sana.pipeline_sana import retrieve_timesteps
from torch import Tensor

from diffusers_sana.pipelines.pipeline_sana_base import SanaPipelineBase
from diffusers_sana.pipelines.request import check_latents, check_options
from diffusers_sana.prompts.encoding import COMPLEX_HUMAN_INSTRUCTION


class SanaPipeline(SanaPipelineBase):
    """Text to image with Sana (arXiv 2410.10629) and SANA-1.5 (arXiv 2501.18427).

    A drop-in for `diffusers.SanaPipeline`: the same components, arguments, seeds and folders. `from_pretrained` reads
    folders that name diffusers' transformer, autoencoder and DPM-Solver and loads this package's in their place;
    `save_pretrained` writes folders that name diffusers' again. Components passed to either pipeline are used as they
    are, whichever package they come from.

    Args:
        tokenizer: Gemma's.
        text_encoder: language model without a head, in bf16 or fp32: Gemma overflows fp16.
        vae: deep compression autoencoder in bf16 or fp32.
        transformer: denoiser.
        scheduler: solver of the flow; any diffusers scheduler for flow prediction.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
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
        """Generates images.

        Args:
            prompt: one or several texts.
            negative_prompt: what to steer away from: one for all prompts, or one each; None is the empty text.
            num_inference_steps: evaluations of the transformer.
            timesteps, sigmas: schedule of one's own, descending, in place of `num_inference_steps`; one of the two.
            guidance_scale: weight of the prompt against the negative prompt; at most 1 turns guidance off and halves
                the work.
            num_images_per_prompt: images of each prompt; they are neighbours in the result.
            height, width: pixels; the native size of the checkpoint by default, or that of `latents`.
            eta: for schedulers that take it.
            generator: source of the noise: one for all images, or a list with one an image.
            latents: noise to begin with, `[B, C, h, w]`.
            prompt_embeds, negative_prompt_embeds: text features `[prompts, L, width]` in place of the texts.
            prompt_attention_mask, negative_prompt_attention_mask: their masks `[prompts, L]`, 1 for a token.
            output_type: "pil", "np", "pt" (`[B, 3, height, width]` in [0, 1]), or "latent" (fp32, `[B, C, h, w]`).
            return_dict: False for a tuple.
            clean_caption: clean the texts as captions from the web; needs beautifulsoup4 and ftfy.
            use_resolution_binning: generate at the trained size of the nearest aspect ratio and scale the images to
                `height` and `width`. Checkpoints without a table of trained sizes generate at the size asked for.
            attention_kwargs: for the attention processors; `{"scale": s}` sets the strength of LoRA adapters.
            callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after each step; what it
                returns replaces the tensors. `pipeline._interrupt = True` ends the loop. The texts are projected once
                for all steps: a callback that changes weights or adapters must return `prompt_embeds` as well.
            callback_on_step_end_tensor_inputs: which of `latents`, `prompt_embeds`, `negative_prompt_embeds` it gets.
            max_sequence_length: tokens of a text; a warning tells what is left out of longer ones.
            complex_human_instruction: text, or its lines, put before each prompt; None for none.

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
        if latents is not None:
            check_latents(latents)
            if height is None and width is None:
                height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
                use_resolution_binning = False
        requested_size, (height, width) = self._sizes(height, width, use_resolution_binning)

        # 2. Texts, [B, L, width]
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

        # 3. Schedule and noise, [B, C, h, w] in fp32
        device = self._execution_device
        schedule, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        latents = self.prepare_latents(
            len(tensors["prompt_embeds"]),
            self.transformer.config.in_channels,
            height,
            width,
            torch.float32,
            device,
            generator,
            latents,
        )

        # 4. Denoising, and images
        latents = self._denoise(
            latents,
            schedule,
            tensors,
            eta=eta,
            generator=generator,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        return self._output(latents, requested_size, output_type, return_dict)
