"""The denoising loop of Sana's pipelines: transformer and scheduler take turns.

Legend: B images (prompts times images per prompt), C latent channels, h w latent height and width, L text tokens.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.checks import check_computed
from diffusers_sana.pipelines.acceleration.cuda_graphs import CudaGraphs, graphed
from diffusers_sana.pipelines.acceleration.step_caches import start_step_cache, step_context
from diffusers_sana.prompts.encoding import pad_text


# What `encode_prompt` returns, in order.
TEXT_TENSORS = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")


@dataclass
class TextInputs:
    """What the transformer is told of the texts; with guidance the negative half comes first.

    Attributes:
        is_guided: whether there are two halves.
        embeds, mask: `[n B, L, width]` and `[n B, L]`, n is 2 with guidance and else 1, unless a pipeline adds to it.
        arguments: the same as keyword arguments of the transformer, projected once for all steps where it can do that.
    """

    is_guided: bool
    embeds: Tensor
    mask: Tensor
    arguments: dict[str, Any]


class DenoisingLoop:
    """Part of `SanaPipelineBase`, which has the components and properties.

    A pipeline calls `_denoise`. What it does otherwise at each step it passes (`predict`, `after_step`) or overrides
    (`_texts`, `_predict`, `_step`).
    """

    transformer: Any
    scheduler: Any
    progress_bar: Any
    guidance_scale: Any
    attention_kwargs: Any
    do_classifier_free_guidance: Any
    interrupt: Any
    enable_cuda_graphs: Any
    _cuda_graphs: CudaGraphs | None
    _num_timesteps: int
    _current_timestep: float

    def _denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        tensors: dict[str, Any],
        *,
        predict: Callable[..., Tensor] | None = None,
        after_step: Callable[[int, Tensor], Tensor] | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback: Callable[[Any, int, Tensor, dict], dict | None] | None = None,
        callback_inputs: Sequence[str] = ("latents",),
    ) -> Tensor:
        """The loop: the transformer predicts, the scheduler steps, until the timesteps or the user's patience end.

        Args:
            latents: `[B, C, h, w]`, at the noise level of the first timestep.
            timesteps: the scheduler's that are still to be done.
            tensors: the four results of `encode_prompt` under the names of `TEXT_TENSORS`, and whatever else callbacks
                may see; what callbacks replace is replaced in here.
            predict: `_predict` or what calls it with more arguments for the transformer.
            after_step: gets the number of the step, from 0, and the latents after it, and returns them changed.
            eta, generator: for schedulers that take them.
            callback, callback_inputs: `callback_on_step_end` and the names of what it gets.

        Returns:
            `[B, C, h, w]`.

        Raises:
            ValueError: the latents are not finite at the end, or a callback returns tensors of other shapes.
        """
        predict = predict or self._predict
        self._num_timesteps = len(timesteps)
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}
        if self._cuda_graphs is not None and self._cuda_graphs.model is not self.transformer:
            self.enable_cuda_graphs()
        times, noisiest = timesteps.tolist(), self.scheduler.config.num_train_timesteps
        text: TextInputs | None = None
        with (
            graphed(self.transformer, self._cuda_graphs) as run,
            self.progress_bar(total=len(timesteps)) as progress_bar,
        ):
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    break
                if text is None or text.is_guided != self.do_classifier_free_guidance:
                    text = self._text_inputs(tensors)
                    start_step_cache(self.transformer, len(times), len(text.mask) // len(latents))
                self._current_timestep = times[i]
                with step_context(self.transformer, i, times, noisiest):
                    prediction = predict(run, latents, t, text)
                latents = self._step(prediction, t, latents, text.is_guided, step_kwargs)
                if after_step is not None:
                    latents = after_step(i, latents)

                if callback is not None:
                    seen = tensors | {"latents": latents}
                    replaced = callback(self, i, t, {name: seen[name] for name in callback_inputs}) or {}
                    _check_replaced(replaced, seen)
                    latents = replaced.get("latents", latents)
                    tensors.update((name, value) for name, value in replaced.items() if name in tensors)
                    if "prompt_embeds" in replaced or "negative_prompt_embeds" in replaced:
                        text = None
                progress_bar.update()
        advice = (
            "Its weights may be damaged, its LoRA or `guidance_scale` too large, or a callback may have returned such"
            " values."
        )
        check_computed("transformer", "latents", latents, self.transformer.dtype, advice)
        return latents

    def _text_inputs(self, tensors: dict[str, Any]) -> TextInputs:
        """The texts as the transformer takes them."""
        embeds, mask = self._texts(tensors)
        embeds = embeds.to(self.transformer.dtype)
        if hasattr(self.transformer, "encode_text"):
            context = self.transformer.encode_text(embeds, mask, attention_kwargs=self.attention_kwargs)
            arguments = {"encoder_hidden_states": None, "text_context": context}
        else:
            arguments = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        return TextInputs(self.do_classifier_free_guidance, embeds, mask, arguments)

    def _texts(self, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Features and mask of a step: both halves where there is guidance, lengthened to the longer of the two."""
        embeds, mask = tensors["prompt_embeds"], tensors["prompt_attention_mask"]
        if not self.do_classifier_free_guidance:
            return embeds, mask
        negative, negative_mask = tensors["negative_prompt_embeds"], tensors["negative_prompt_attention_mask"]
        length = max(negative.shape[1], embeds.shape[1])
        halves = pad_text(negative, negative_mask, length), pad_text(embeds, mask, length)
        embeds, mask = (torch.cat(both) for both in zip(*halves, strict=True))
        return embeds, mask

    def _predict(
        self, run: Callable[..., Tensor], latents: Tensor, t: Tensor, text: TextInputs, **more: Any
    ) -> Tensor:
        """The transformer's prediction `[n B, C, h, w]`; `run` calls it, `more` are further arguments of it."""
        model_input = torch.cat([latents] * (len(text.mask) // len(latents))).to(self.transformer.dtype)
        return run(
            hidden_states=model_input,
            timestep=t.expand(len(model_input)) * self.transformer.config.timestep_scale,
            attention_kwargs=self.attention_kwargs,
            return_dict=False,
            **text.arguments,
            **more,
        )

    def _step(
        self, prediction: Tensor, t: Tensor, latents: Tensor, is_guided: bool, step_kwargs: dict[str, Any]
    ) -> Tensor:
        """Guidance and the scheduler's step: the next latents `[B, C, h, w]`."""
        if is_guided and hasattr(self.scheduler, "step_guided"):  # both in one
            arguments = (prediction, t, latents, self.guidance_scale)
            return self.scheduler.step_guided(*arguments, **step_kwargs, return_dict=False)[0]
        prediction = prediction.float()
        if is_guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + self.guidance_scale * (conditional - unconditional)
        return self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0]


def _check_replaced(replaced: dict[str, Any], seen: dict[str, Any]) -> None:
    """Raises where a callback has returned tensors for another number of images than there are."""
    count = len(seen["latents"])
    for name, tensor in replaced.items():
        # The control image may come back as both halves of a guided batch, as diffusers has it.
        is_right = len(tensor) == count or (name == "control_image" and len(tensor) > 0 == len(tensor) % count)
        if name in seen and not is_right:
            raise ValueError(
                f"`callback_on_step_end` must return a row of `{name}` for each of {count} images, but returned"
                f" {len(tensor)}. Every image must stay in the batch to the end."
            )
