"""The guiders of diffusers (`diffusers.guiders`) in the denoising loop, in place of plain classifier-free guidance.

At each step a guider says which predictions it needs: of the prompts, of the negative prompts, and of a transformer
with some layers changed. It makes one prediction of them. Those of the unchanged transformer are one batch.

Legend: B images or videos, C latent channels, T latent frames (of videos only), h w latent height and width.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor

from diffusers_sana._compat import private
from diffusers_sana.locks import exclusive
from diffusers_sana.models.transformers.text_sana import SanaTextContext
from diffusers_sana.pipelines.changed_layers import changed_layers
from diffusers_sana.pipelines.sampling import Denoiser, Predict, TextInputs


NEGATIVE, POSITIVE = 0, 1  # halves of the batch, in its order


def check_guider(guider: Any, guidance_scale: float, default: float) -> None:
    """Raises where the argument `guider` of a pipeline cannot be used, or contradicts `guidance_scale`.

    Args:
        default: of `guidance_scale`.
    """
    # Not at the top: where kornia is installed, this import takes seconds.
    from diffusers.guiders import BaseGuidance, LTX2Guidance

    if not isinstance(guider, BaseGuidance):
        raise TypeError(
            "`guider` must be a guider of diffusers, such as `diffusers.ClassifierFreeGuidance(guidance_scale=4.5)`,"
            f" got {guider!r}."
        )
    if isinstance(guider, LTX2Guidance):
        raise ValueError(
            "`guider` must not be a LTX2Guidance, whose predictions are clean latents of LTX-2 and need arguments of"
            " its transformer. Take a ClassifierFreeGuidance or a SkipLayerGuidance."
        )
    if guidance_scale != default:
        raise ValueError(
            f"`guidance_scale` must not be given with `guider`, which has its own scale, got {guidance_scale}. Set the"
            f" scale of the {type(guider).__name__}."
        )


class Guidance:
    """A guider in one call of a pipeline: a copy, so that calls share no state and the user's guider stays as it is.

    Args:
        guider: checked by `check_guider`.
        transformer: of either package.
        graphs: `CudaGraphs` of the transformer, or None.

    Raises:
        ValueError: the guider changes layers that do not exist, or that have only part of the image.
        RuntimeError: it changes layers of a transformer whose code is recorded or compiled.
    """

    def __init__(self, guider: Any, transformer: Any, graphs: Any) -> None:
        from diffusers.guiders import BaseGuidance

        self.transformer = transformer
        self._guider = copy.deepcopy(guider)
        self._changed, self._configs, self._blur = _changes(self._guider)
        self._has_hooks = not self._changed and type(guider).prepare_models is not BaseGuidance.prepare_models
        self._halves: tuple[TextInputs, list[TextInputs]] | None = None
        if self._changed or self._has_hooks:
            self._check_changeable(graphs)

    def around(self, predict: Predict, num_steps: int) -> Predict:
        """A `predict` for the denoising loop that returns the guided prediction `[B, C, (T,) h, w]` in fp32.

        Args:
            predict: the transformer's prediction for a batch.
            num_steps: of the loop.

        Raises:
            ValueError: a step cache, and a guider that changes layers or leaves out the negative prompts at a step.
        """
        if getattr(self.transformer, "is_cache_enabled", False):
            self._check_cacheable(num_steps)
        return partial(self._predict, predict, num_steps)

    def _predict(
        self, predict: Predict, num_steps: int, model: Denoiser, latents: Tensor, t: Tensor, text: TextInputs
    ) -> Tensor:
        conditions = self._conditions(model.step_index, num_steps, t)
        alone = [self._has_hooks or _name(condition) == self._changed for condition in conditions]
        halves = sorted({each.half for each, is_alone in zip(conditions, alone, strict=True) if not is_alone})
        predictions: Sequence[Tensor] = ()
        if halves:
            batch = text if len(halves) == 2 else self._half_of(text, halves[0])
            predictions = predict(model, latents, t, batch).float().chunk(len(halves))
        for condition, is_alone in zip(conditions, alone, strict=True):
            if is_alone:
                half = self._half_of(text, condition.half)
                condition.noise_pred = self._predict_changed(predict, model, latents, t, half).float()
            else:
                condition.noise_pred = predictions[halves.index(condition.half)]
        return self._guided(conditions)

    def _conditions(self, step: int, num_steps: int, t: Tensor | None) -> list[Any]:
        """What the guider needs at a step: objects with the `half` of the texts, to be given a `noise_pred`."""
        self._guider.set_state(step=step, num_inference_steps=num_steps, timestep=t)
        conditions = self._guider.prepare_inputs({"half": (POSITIVE, NEGATIVE)})
        for condition in conditions:
            # Where classifier-free guidance is off, diffusers takes the negative prompts for this one.
            if _name(condition) == self._changed and self._changed != "pred_uncond":
                condition.half = POSITIVE
        return conditions

    def _guided(self, conditions: list[Any]) -> Tensor:
        """What the guider makes of the predictions of its conditions."""
        from diffusers.guiders import FrequencyDecoupledGuidance, MagnitudeAwareGuidance

        shape = conditions[0].noise_pred.shape
        for condition in conditions:
            prediction = condition.noise_pred
            if isinstance(self._guider, MagnitudeAwareGuidance):
                # It asks `torch.norm` for a norm over all axes, of which that takes two.
                condition.noise_pred = prediction.flatten(2)
            elif isinstance(self._guider, FrequencyDecoupledGuidance):
                # The pyramid of kornia is of images, which for videos are the frames.
                images = prediction.reshape(*shape[:2], -1, *shape[-2:]).transpose(1, 2)
                condition.noise_pred = images.flatten(0, 1)
        pred = self._guider(conditions).pred
        if isinstance(self._guider, FrequencyDecoupledGuidance):
            # It returns what kornia has padded on the right and at the bottom.
            pred = pred.unflatten(0, (shape[0], -1)).transpose(1, 2)[..., : shape[-2], : shape[-1]]
        return pred.reshape(shape)

    def _predict_changed(
        self, predict: Predict, model: Denoiser, latents: Tensor, t: Tensor, text: TextInputs
    ) -> Tensor:
        with exclusive(self.transformer):
            if self._has_hooks:
                try:
                    self._guider.prepare_models(self.transformer)
                    return predict(model, latents, t, text)
                finally:
                    self._guider.cleanup_models(self.transformer)
            patch_size = self.transformer.config.patch_size
            rows, columns = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size[1:]
            grid = latents.shape[-2] // rows, latents.shape[-1] // columns
            with changed_layers(self.transformer, self._configs, grid, self._blur):
                return predict(model, latents, t, text)

    def _half_of(self, text: TextInputs, half: int) -> TextInputs:
        """The texts of one half, the same object at all steps: a ControlNet projects each text that it meets."""
        if self._halves is None or self._halves[0] is not text:
            self._halves = text, [_half(text, each) for each in (NEGATIVE, POSITIVE)]
        return self._halves[1][half]

    def _check_changeable(self, graphs: Any) -> None:
        name = f"`guider`, a {type(self._guider).__name__}, changes layers of the transformer and"
        if graphs is not None:
            raise RuntimeError(
                f"{name} cannot be combined with `enable_cuda_graphs`, which replays what was recorded. Call"
                " `pipe.disable_cuda_graphs()`."
            )
        modules = self.transformer.modules()
        if is_compiled_module(self.transformer) or any(each._compiled_call_impl is not None for each in modules):
            raise RuntimeError(f"{name} cannot be combined with `torch.compile`. Load the transformer without it.")
        if self._blur is not None and getattr(self.transformer, "_parallel_config", None) is not None:
            raise ValueError(
                f"{name} cannot be combined with `enable_parallelism`: it blurs the whole image, and each process has"
                " part of it."
            )
        with exclusive(self.transformer), changed_layers(self.transformer, self._configs, (1, 1), self._blur):
            pass  # raises for layers that are not there

    def _check_cacheable(self, num_steps: int) -> None:
        steps = (self._conditions(step, num_steps, None) for step in range(num_steps))
        has_both = all({each.half for each in conditions} == {NEGATIVE, POSITIVE} for conditions in steps)
        if self._changed or self._has_hooks or not has_both:
            raise ValueError(
                f"`guider`, a {type(self._guider).__name__}, cannot be combined with a step cache: the cache reuses"
                " results of the step before, which must be of both halves and the same layers. Let it guide at all"
                " steps without changing layers, or call `transformer.disable_cache()`."
            )


def _changes(guider: Any) -> tuple[str | None, Sequence[Any], tuple[float, float] | None]:
    """The name of the prediction for which `changed_layers` changes layers, or None; its configs, and the blur.

    By the method that would put hooks there, because a class derived from one of these may have another.
    """
    from diffusers.guiders import (
        AutoGuidance,
        PerturbedAttentionGuidance,
        SkipLayerGuidance,
        SmoothedEnergyGuidance,
    )

    method = type(guider).prepare_models
    if method is AutoGuidance.prepare_models:
        return "pred_uncond", guider.auto_guidance_config, None
    if method in (SkipLayerGuidance.prepare_models, PerturbedAttentionGuidance.prepare_models):
        return "pred_cond_skip", guider.skip_layer_config, None
    if method is SmoothedEnergyGuidance.prepare_models:
        blur = guider.seg_blur_sigma, guider.seg_blur_threshold_inf
        return "pred_cond_seg", guider.seg_guidance_config, blur
    return None, [], None


def _name(condition: Any) -> str:
    """The name under which a guider wants a prediction."""
    from diffusers.guiders import BaseGuidance

    return getattr(condition, private(BaseGuidance, "_identifier_key"))


def _half(text: TextInputs, half: int) -> TextInputs:
    """One half of the texts, projected already."""
    count = len(text.mask) // 2
    start = half * count

    def rows(value: Any) -> Any:
        if isinstance(value, SanaTextContext):
            return value.rows(start, start + count)
        return value[start : start + count] if isinstance(value, torch.Tensor) else value

    arguments = {name: rows(value) for name, value in text.arguments.items()}
    return TextInputs(False, rows(text.embeds), rows(text.mask), arguments)
