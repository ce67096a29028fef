"""The denoising loop: transformer and scheduler take turns.

A step has three parts, each a function that a pipeline can replace: `arrange` puts the texts of the batch together,
`predict` asks the transformer, `step` applies guidance and the scheduler.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens; n
rows of the batch per image, 2 with guidance and else 1, unless a pipeline adds to it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_sana.checks import check_computed
from diffusers_sana.locks import exclusive
from diffusers_sana.models.transformers.text_sana import ImageStates, num_image_rows, repeated_rows
from diffusers_sana.pipelines.acceleration.cuda_graphs import release_graphs
from diffusers_sana.pipelines.acceleration.step_caches import StepCache
from diffusers_sana.pipelines.call import Call
from diffusers_sana.prompts.encoding import pad_text


logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class TextInputs:
    """What the transformer is told of the texts; with guidance the negative half comes first.

    Attributes:
        is_guided: whether there are two halves.
        embeds, mask: `[n B, L, width]` and `[n B, L]`.
        arguments: the same as keyword arguments of the transformer, projected once for all steps where it can do that.
    """

    is_guided: bool
    embeds: Tensor
    mask: Tensor
    arguments: dict[str, Any]


@dataclass
class Denoiser:
    """The transformer as a call sees it: each forward runs alone, with the step cache and the adapters of this call.

    Attributes:
        transformer: of either package.
        call: whose `attention_kwargs` it gets.
        cache: the step cache of this call.
        step_index: of the loop, from 0.
    """

    transformer: Any
    call: Call
    cache: StepCache
    step_index: int = 0

    def __call__(self, **arguments: Any) -> Tensor:
        """The first output of the transformer; out of memory, once more without the CUDA graphs on its device.

        Not with a step cache, whose state may be that of a part of the step already.
        """
        try:
            return self._predict(arguments)
        except torch.OutOfMemoryError as error:
            if self.cache.is_enabled or not release_graphs(self.transformer.device):
                raise
            reason = str(error)  # not the error itself: its traceback keeps the tensors alive
        logger.warning(f"Out of memory in a step; trying again without the CUDA graphs. {reason}")
        return self._predict(arguments)

    def _predict(self, arguments: dict[str, Any]) -> Tensor:
        with exclusive(self.transformer), self.cache.at(self.step_index):
            if self.call.graphs is not None and self.call.graphs.is_active:
                return self.call.graphs(**arguments).clone()  # another call overwrites the memory of a graph
            return self.transformer(**arguments)[0]


Arrange = Callable[[dict[str, Any], bool], tuple[Tensor, Tensor]]
Predict = Callable[[Denoiser, Tensor, Tensor, TextInputs], Tensor]
Step = Callable[[Call, Tensor, Tensor, Tensor, bool, dict[str, Any]], Tensor]  # the bool: prediction has two halves


def both_texts(tensors: dict[str, Any], is_guided: bool) -> tuple[Tensor, Tensor]:
    """Features and mask of a batch: both halves where there is guidance, padded to the longer of the two."""
    embeds, mask = tensors["prompt_embeds"], tensors["prompt_attention_mask"]
    if not is_guided:
        return embeds, mask
    negative, negative_mask = tensors["negative_prompt_embeds"], tensors["negative_prompt_attention_mask"]
    length = max(negative.shape[1], embeds.shape[1])
    halves = pad_text(negative, negative_mask, length), pad_text(embeds, mask, length)
    embeds, mask = (torch.cat(both) for both in zip(*halves, strict=True))
    return embeds, mask


def predict_flow(
    model: Denoiser, latents: Tensor, t: Tensor, text: TextInputs, *, times: Tensor | None = None, **more: Any
) -> Tensor:
    """The transformer's prediction `[n B, C, h, w]`.

    Args:
        model, latents, t, text: of a step.
        times: `[n B, ...]` in place of `t`, where it is not the same for all of an image.
        more: further arguments of the transformer.
    """
    transformer = model.transformer
    model_input = torch.cat([latents] * (len(text.mask) // len(latents))).to(transformer.dtype)
    times = t.expand(len(model_input)) if times is None else times
    return model(
        hidden_states=model_input,
        timestep=times * transformer.config.get("timestep_scale", 1.0),
        attention_kwargs=model.call.attention_kwargs,
        return_dict=False,
        **text.arguments,
        **more,
    )


def guided_step(
    call: Call, prediction: Tensor, t: Tensor, latents: Tensor, has_halves: bool, options: dict[str, Any]
) -> Tensor:
    """Classifier-free guidance, where there are two halves, and the scheduler's step: the next `[B, C, h, w]`."""
    if has_halves and hasattr(call.scheduler, "step_guided"):  # both in one operation
        arguments = (prediction, t, latents, call.guidance_scale)
        return call.scheduler.step_guided(*arguments, **options, return_dict=False)[0]
    prediction = prediction.float()
    if has_halves:
        unconditional, conditional = prediction.chunk(2)
        prediction = unconditional + call.guidance_scale * (conditional - unconditional)
    return call.scheduler.step(prediction, t, latents, **options, return_dict=False)[0]


def denoise(
    transformer: Any,
    latents: Tensor,
    timesteps: Tensor,
    tensors: dict[str, Any],
    call: Call,
    *,
    arrange: Arrange = both_texts,
    predict: Predict = predict_flow,
    step: Step = guided_step,
    after_step: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """The loop: the transformer predicts and the scheduler steps, until the schedule ends or `call.interrupt` is set.

    Args:
        transformer: of either package.
        latents: `[B, C, h, w]`, at the noise level of the first timestep.
        timesteps: those of the scheduler that are still to be done.
        tensors: from `encode_prompts`, and whatever else callbacks may see; callbacks replace entries of it. With
            image prompts also `image_states`, B rows.
        call: scheduler, guidance scale, callback, and what the callback may change.
        arrange: features and mask of the batch from `tensors`, and whether there is guidance.
        predict: the transformer's prediction.
        step: the latents after a step.
        after_step: gets the number of the step, from 0, and the latents after it, and returns them changed.

    Returns:
        `[B, C, h, w]`.

    Raises:
        ValueError: the latents are not finite at the end, or a callback returns tensors of other shapes.
    """
    accepted = inspect.signature(call.scheduler.step).parameters
    options = {name: getattr(call, name) for name in ("eta", "generator") if name in accepted}
    times = timesteps.tolist()
    call.num_timesteps = len(times)
    cache = StepCache(transformer, times, call.scheduler.config.num_train_timesteps)
    model = Denoiser(transformer, call, cache)
    if call.guidance is not None:
        predict = call.guidance.around(predict, len(times))
    text: TextInputs | None = None
    if call.graphs is not None:
        with exclusive(transformer):
            call.graphs.refresh()
    with call.progress_bar(total=len(times)) as progress_bar:
        for i, t in enumerate(timesteps):
            if call.interrupt:
                break
            model.step_index, call.current_timestep = i, times[i]
            is_guided = call.is_guided
            if text is None or text.is_guided != is_guided:
                embeds, mask = arrange(tensors, is_guided)
                images = tensors.get("image_states", ())
                text = project_texts(transformer, embeds, mask, is_guided, call.attention_kwargs, images)
                cache.restart(len(text.mask) // len(latents))
            prediction = predict(model, latents, t, text)
            has_halves = is_guided and call.guidance is None
            latents = step(call, prediction, t, latents, has_halves, options)
            if after_step is not None:
                latents = after_step(i, latents)

            if call.callback is not None:
                seen = tensors | {"latents": latents}
                replaced = call.callback(i, t, {name: seen[name] for name in call.callback_inputs}) or {}
                _check_replaced(replaced, seen)
                latents = replaced.get("latents", latents)
                tensors.update((name, value) for name, value in replaced.items() if name in tensors)
                if "prompt_embeds" in replaced or "negative_prompt_embeds" in replaced:
                    text = None
                if call.graphs is not None:  # it may have set other adapters
                    with exclusive(transformer):
                        call.graphs.refresh_within_call()
            progress_bar.update()
    advice = (
        "Its weights may be damaged, its LoRA or `guidance_scale` too large, or a callback may have returned such"
        " values."
    )
    check_computed("transformer", "latents", latents, transformer.dtype, advice)
    return latents


def sample_by_renoising(
    predict: Callable[[Tensor, float], Tensor],
    latents: Tensor,
    timesteps: Sequence[float],
    levels: Sequence[float],
    generator: torch.Generator | list[torch.Generator] | None,
) -> Tensor:
    """Few steps of a distilled model: each predicts the result, which gets fresh noise of the next level.

    `x0 = x - σ v`, then `x = (1 - σ') x0 + σ' ε`, for velocities `v = ε - x0` (DMD2, arXiv 2405.14867).

    Args:
        predict: the velocity in fp32, from latents and a timestep.
        latents: noise, fp32.
        timesteps, levels: what the model is told, and the noise levels σ, descending from 1.
        generator: source of the fresh noise, one or one per row.

    Returns:
        The last `x0`.
    """
    for index, (time, level) in enumerate(zip(timesteps, levels, strict=True)):
        if index:
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
            latents = (1 - level) * latents + level * noise
        latents = latents - level * predict(latents, time)
    return latents


def project_texts(
    transformer: Any,
    embeds: Tensor,
    mask: Tensor,
    is_guided: bool,
    attention_kwargs: dict[str, Any] | None,
    image_states: ImageStates = (),
) -> TextInputs:
    """The texts, and image prompts with B rows, as the transformer takes them. Negative prompts have no image."""
    embeds = embeds.to(transformer.dtype)
    if hasattr(transformer, "encode_text"):
        more = {}
        if image_states:
            copies = len(mask) // num_image_rows(image_states) - is_guided
            more["image_states"] = repeated_rows(image_states, copies)
        with exclusive(transformer):
            context = transformer.encode_text(embeds, mask, attention_kwargs=attention_kwargs, **more)
        arguments = {"encoder_hidden_states": None, "text_context": context}
    else:
        arguments = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
    return TextInputs(is_guided, embeds, mask, arguments)


def _check_replaced(replaced: dict[str, Any], seen: dict[str, Any]) -> None:
    """Raises where a callback has returned tensors for another number of images than there are."""
    count = len(seen["latents"])
    for name, value in replaced.items():
        for tensor in value if isinstance(value, list | tuple) else [value]:  # several control images are a list
            # The control image may come back as both halves of a guided batch, as diffusers has it.
            is_right = len(tensor) == count or (name == "control_image" and len(tensor) > 0 == len(tensor) % count)
            if name in seen and not is_right:
                raise ValueError(
                    f"`callback_on_step_end` must return a row of `{name}` for each of {count} images, but returned"
                    f" {len(tensor)}. Every image must stay in the batch to the end."
                )
