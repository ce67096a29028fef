"""What the pipelines of SANA-Sprint share: steps of TrigFlow with a transformer of flow matching (arXiv 2503.09641).

`schedulers/trigflow.py` has the formulas. In here, latents have the standard deviation `sigma_data` of the scheduler.

Legend: B images, C latent channels, h w latent height and width, L text tokens.
"""

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_scm import SCMScheduler
from torch import Tensor

from diffusers_sana.checks import check_number
from diffusers_sana.loaders.lora.student import load_student
from diffusers_sana.models.transformers.sprint_student import TRAIN_TIMESTEPS
from diffusers_sana.pipelines.call import Call
from diffusers_sana.pipelines.controlnet_conditioning import Residuals
from diffusers_sana.pipelines.image_prompts import ImagePromptPipeline
from diffusers_sana.pipelines.request import check_numbers
from diffusers_sana.pipelines.sampling import Denoiser, TextInputs, denoise
from diffusers_sana.prompts.encoding import Prompts, encode_prompts
from diffusers_sana.schedulers.trigflow import flow_to_trigflow


class SanaSprintPipelineBase(ImagePromptPipeline):
    """Base of the pipelines of SANA-Sprint. The guidance scale is an input of the transformer: one pass per step."""

    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    _has_negative_prompt = False

    @classmethod
    def from_teacher(cls, teacher: DiffusionPipeline, lora: str | os.PathLike, **kwargs: Any) -> Self:
        """A pipeline of the student that was distilled as a LoRA of a teacher, which stays as it is.

        Args:
            teacher: pipeline of the Sana that the student was distilled from. It shares its other components.
            lora: what `recipes.sprint` saved: folder or Hub repository with the LoRA and the scheduler.
            kwargs: other arguments of `read_lora` of `loaders/lora/files.py`, such as `revision`.
        """
        student = load_student(teacher.transformer, lora, **kwargs)
        hub = {name: kwargs[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in kwargs}
        scheduler = SCMScheduler.from_pretrained(lora, subfolder="scheduler", **hub)
        return cls.from_pipe(teacher, transformer=student, scheduler=scheduler)

    def encode_prompt(
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
        """Text features `[B, L, width]` and mask `[B, L]`; the arguments are those of `SanaPipeline.encode_prompt`."""
        prompts, device = Prompts.of(locals()), device or self._execution_device
        tensors = encode_prompts(self.tokenizer, self.text_encoder, prompts, is_guided=False, device=device)
        return tensors["prompt_embeds"], tensors["prompt_attention_mask"]


def count_steps(
    transformer: Any,
    scheduler: Any,
    num_inference_steps: int,
    timesteps: Sequence[float] | None,
    max_timesteps: float | None,
    intermediate_timesteps: float | None,
) -> int:
    """The number of steps. Raises where model, scheduler and steps are not for SANA-Sprint."""
    if not transformer.config.get("guidance_embeds"):
        raise ValueError(
            "`transformer` must be SANA-Sprint's, with `guidance_embeds=True` in its config. Use SanaPipeline for"
            " Sana and SANA-1.5."
        )
    if "sigma_data" not in scheduler.config:
        raise TypeError(f"`scheduler` must be an SCMScheduler, got {type(scheduler).__name__}.")
    for name, angle in (("max_timesteps", max_timesteps), ("intermediate_timesteps", intermediate_timesteps)):
        if angle is not None:
            check_number(name, angle)
    if timesteps is None:
        return num_inference_steps
    angles = check_numbers("timesteps", timesteps)
    if len(angles) < 2 or not bool((angles.diff() < 0).all()) or angles[-1] < 0:
        raise ValueError(
            "`timesteps` must be descending angles from π/2 to 0, one more than there are steps, such as"
            f" [1.5683, 1.3, 0.0], got {timesteps!r}."
        )
    return len(angles) - 1


def lay_out_angles(
    scheduler: Any,
    num_steps: int,
    timesteps: Sequence[float] | Tensor | None,
    max_timesteps: float | None,
    intermediate_timesteps: float | None,
    device: torch.device,
    begin: int = 0,
) -> Tensor:
    """Sets the steps of `scheduler` and has it begin at one of them; the angles before each step that is left.

    The intermediate angle is for two steps only, so it is left out for any other number, and with `timesteps`.
    """
    if timesteps is not None:
        timesteps = timesteps if isinstance(timesteps, Tensor) else list(timesteps)
        max_timesteps = intermediate_timesteps = None
    scheduler.set_timesteps(
        num_steps,
        timesteps=timesteps,
        device=device,
        max_timesteps=max_timesteps,
        intermediate_timesteps=intermediate_timesteps if num_steps == 2 else None,
    )
    scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:-1]


def predict_trigflow(
    model: Denoiser,
    latents: Tensor,
    t: Tensor,
    text: TextInputs,
    dtype: torch.dtype,
    residuals: Residuals | None = None,
) -> Tensor:
    """The prediction of TrigFlow `[B, C, h, w]`, in fp32, from the transformer's.

    Args:
        model, latents, t, text: of a step.
        residuals: of the ControlNets, or None.
        dtype: that the guidance scale is rounded to. It is that of the text, as in diffusers; the authors' code keeps
            fp32.
    """
    transformer, sigma = model.transformer, model.call.scheduler.config.sigma_data
    guidance = torch.full([len(latents)], model.call.guidance_scale, device=latents.device).to(dtype)

    def velocity(scaled: Tensor, times: Tensor) -> Tensor:
        more = {} if residuals is None else residuals(model, scaled, times * TRAIN_TIMESTEPS, text)
        return model(
            hidden_states=scaled.to(transformer.dtype),
            timestep=times,
            guidance=guidance * transformer.config.guidance_embeds_scale,
            attention_kwargs=model.call.attention_kwargs,
            return_dict=False,
            **text.arguments,
            **more,
        )

    return flow_to_trigflow(velocity, latents / sigma, t.expand(len(latents))).float() * sigma


def denoise_trigflow(
    transformer: Any,
    latents: Tensor,
    angles: Tensor,
    tensors: dict[str, Any],
    call: Call,
    residuals: Residuals | None = None,
) -> Tensor:
    """`denoise` in TrigFlow: from latents of standard deviation `sigma_data` to latents of 1, both `[B, C, h, w]`.

    After each step the scheduler adds new noise up to the next angle. The result is the image in the last latents,
    also after an interruption; or what a callback has made of the last latents. `residuals` are those of ControlNets.
    """
    stepped, denoised = latents, latents
    text_dtype = tensors["prompt_embeds"].dtype

    def predict(model: Denoiser, latents: Tensor, t: Tensor, text: TextInputs) -> Tensor:
        return predict_trigflow(model, latents, t, text, text_dtype, residuals)

    def step(
        call: Call, prediction: Tensor, t: Tensor, latents: Tensor, is_guided: bool, options: dict[str, Any]
    ) -> Tensor:
        nonlocal stepped, denoised
        stepped, denoised = call.scheduler.step(prediction, t, latents, **options, return_dict=False)
        return stepped

    latents = denoise(transformer, latents, angles, tensors, call, predict=predict, step=step)
    return (denoised if latents is stepped else latents) / call.scheduler.config.sigma_data
