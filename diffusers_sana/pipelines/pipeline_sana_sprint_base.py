"""What the pipelines of SANA-Sprint share: steps of TrigFlow with a transformer of flow matching (arXiv 2503.09641).

TrigFlow mixes image and noise as `x = cos(t) image + sin(t) noise`, t from π/2 to 0, both of standard deviation σ. The
transformer knows the flow `(1 - τ) image + τ noise`: the same points, scaled by `√(τ² + (1 - τ)²)`, at
`τ = sin(t) / (sin(t) + cos(t))`. Section 3.1 of the paper shows that the change of variables loses nothing.

Legend: B images, C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.checks import check_integer, check_number
from diffusers_sana.pipelines.pipeline_sana_base import SanaPipelineBase
from diffusers_sana.pipelines.request import check_numbers
from diffusers_sana.pipelines.sampling import TextInputs


class TrigFlowBase(SanaPipelineBase):
    """Base of the pipelines of SANA-Sprint. The guidance scale is an input of the transformer: one pass a step."""

    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    _stepped: Tensor
    _denoised: Tensor

    @property
    def do_classifier_free_guidance(self) -> bool:
        return False

    def encode_prompt(  # type: ignore[override]
        self,
        prompt: str | list[str] | None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int = 300,
        complex_human_instruction: str | Sequence[str] | None = None,
        lora_scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text features `[B, L, width]` and mask `[B, L]`; see `SanaPipeline.encode_prompt`."""
        embeds, mask, _, _ = super().encode_prompt(
            prompt,
            False,
            num_images_per_prompt=num_images_per_prompt,
            device=device,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            clean_caption=clean_caption,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=complex_human_instruction,
            lora_scale=lora_scale,
        )
        return embeds, mask

    def _check_schedule(
        self,
        num_inference_steps: int,
        timesteps: Sequence[float] | None,
        max_timesteps: float | None,
        intermediate_timesteps: float | None,
    ) -> int:
        """The number of steps. Raises where model, scheduler and steps are not for SANA-Sprint."""
        if not self.transformer.config.get("guidance_embeds"):
            raise ValueError(
                "`transformer` must be SANA-Sprint's, with `guidance_embeds=True` in its config. Use SanaPipeline for"
                " Sana and SANA-1.5."
            )
        if "sigma_data" not in self.scheduler.config:
            raise TypeError(f"`scheduler` must be an SCMScheduler, got {type(self.scheduler).__name__}.")
        check_integer("num_inference_steps", num_inference_steps)
        for name, angle in (("max_timesteps", max_timesteps), ("intermediate_timesteps", intermediate_timesteps)):
            if angle is not None:
                check_number(name, angle)
        if timesteps is not None:
            angles = check_numbers("timesteps", timesteps)
            if len(angles) < 2 or not bool((angles.diff() < 0).all()) or angles[-1] < 0:
                raise ValueError(
                    "`timesteps` must be descending angles from π/2 to 0, one more than there are steps, such as"
                    f" [1.5683, 1.3, 0.0], got {timesteps!r}."
                )
            num_inference_steps = len(angles) - 1
        return num_inference_steps

    def _lay_out(
        self,
        num_steps: int,
        timesteps: Sequence[float] | Tensor | None,
        max_timesteps: float | None,
        intermediate_timesteps: float | None,
        begin: int = 0,
    ) -> Tensor:
        """Has the scheduler lay out the steps and begin at one of them; the angles before each step that is left.

        The intermediate angle is for two steps only, so it is left out for any other number, and with `timesteps`.
        """
        if timesteps is not None:
            timesteps = timesteps if isinstance(timesteps, Tensor) else list(timesteps)
            max_timesteps = intermediate_timesteps = None
        self.scheduler.set_timesteps(
            num_steps,
            timesteps=timesteps,
            device=self._execution_device,
            max_timesteps=max_timesteps,
            intermediate_timesteps=intermediate_timesteps if num_steps == 2 else None,
        )
        self.scheduler.set_begin_index(begin)
        return self.scheduler.timesteps[begin:-1]

    def _denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Any], **options: Any) -> Tensor:
        """The loop of `DenoisingLoop`; begins with latents of standard deviation σ and returns them of 1."""
        predict = partial(self._predict, guidance_dtype=tensors["prompt_embeds"].dtype)
        latents = super()._denoise(latents, timesteps, tensors, predict=predict, **options)
        # What a callback made of the last latents is the result; else the image in them, also after an interruption.
        latents = self._denoised if latents is self._stepped else latents
        del self._denoised, self._stepped
        return latents / self.scheduler.config.sigma_data

    def _predict(  # type: ignore[override]
        self,
        run: Callable[..., Tensor],
        latents: Tensor,
        t: Tensor,
        text: TextInputs,
        guidance_dtype: torch.dtype,
    ) -> Tensor:
        """The prediction of TrigFlow `[B, C, h, w]`, in fp32, from the transformer's."""
        config, sigma = self.transformer.config, self.scheduler.config.sigma_data
        angles = t.expand(len(latents))
        times = angles.sin() / (angles.cos() + angles.sin())  # τ
        tau = times.view(-1, 1, 1, 1)
        norm = torch.sqrt(tau**2 + (1 - tau) ** 2)
        scaled = latents / sigma * norm
        # Rounded to the dtype of the text, as in diffusers; the authors' code keeps fp32.
        guidance = torch.full([len(latents)], self.guidance_scale, device=latents.device).to(guidance_dtype)
        velocity = run(
            hidden_states=scaled.to(self.transformer.dtype),
            timestep=times,
            guidance=guidance * config.guidance_embeds_scale,
            attention_kwargs=self.attention_kwargs,
            return_dict=False,
            **text.arguments,
        )
        return ((1 - 2 * tau) * scaled + (1 - 2 * tau + 2 * tau**2) * velocity).float() / norm * sigma

    def _step(
        self, prediction: Tensor, t: Tensor, latents: Tensor, is_guided: bool, step_kwargs: dict[str, Any]
    ) -> Tensor:
        """The scheduler's step: to the image, and back into new noise up to the next angle; `[B, C, h, w]`."""
        self._stepped, self._denoised = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)
        return self._stepped
