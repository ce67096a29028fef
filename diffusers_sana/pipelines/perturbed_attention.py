"""Perturbed-attention guidance (PAG, arXiv 2403.17377): away from what the model draws with some self-attentions off.

Each step gets one more batch of the prompts, for which the chosen self-attentions are the identity. With the
predictions u of the negative prompts, c of the prompts and p of the perturbed ones, the guided prediction is
`u + guidance_scale * (c - u) + pag_scale * (c - p)`, or `c + pag_scale * (c - p)` without negative prompts.

Legend: B images, C latent channels, h w latent height and width, L text tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_sana.checks import check_number
from diffusers_sana.models.layers import hooks_of
from diffusers_sana.models.transformers.attention_sana import SanaPAGAttnProcessor
from diffusers_sana.pipelines.sampling import DenoisingLoop


# Spelt out as far as diffusers' check of arguments can follow.
PAGLayers = str | int | Sequence[str] | Sequence[int]

DEFAULT_PAG_LAYERS = "transformer_blocks.0"


class PAGDenoisingLoop(DenoisingLoop):
    """The denoising loop with a perturbed batch; put before the pipeline among the bases, it works with any."""

    pag_applied_layers: list[str | int]
    _pag_layers: list[str | int]  # of this call
    _pag_scale: float
    _pag_adaptive_scale: float
    _is_perturbed = False  # for all of this call, whatever a callback changes

    @property
    def pag_scale(self) -> float:
        return self._pag_scale

    @property
    def pag_adaptive_scale(self) -> float:
        return self._pag_adaptive_scale

    @property
    def do_perturbed_attention_guidance(self) -> bool:
        return self._pag_scale > 0 and len(self._pag_layers) > 0

    @property
    def do_pag_adaptive_scaling(self) -> bool:
        return self.do_perturbed_attention_guidance and self._pag_adaptive_scale > 0

    def set_pag_applied_layers(self, pag_applied_layers: PAGLayers) -> None:
        """Chooses the layers for the calls that name none.

        Args:
            pag_applied_layers: numbers of transformer blocks, or names of modules such as "transformer_blocks.8", with
                every self-attention in them; one or several. None at all turns perturbed-attention guidance off.

        Raises:
            TypeError: neither names nor numbers.
            ValueError: no self-attention of that name.
        """
        layers = _as_list(pag_applied_layers)
        if self.transformer is not None:
            self_attentions(self.transformer, layers)
        self.pag_applied_layers = layers

    def _start_pag(self, pag_scale: float, pag_adaptive_scale: float, pag_applied_layers: PAGLayers | None) -> None:
        """Checks the arguments of a call, and sets what the properties tell of it."""
        for name, value in (("pag_scale", pag_scale), ("pag_adaptive_scale", pag_adaptive_scale)):
            check_number(name, value)
            if value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}. 0 turns it off.")
        layers = self.pag_applied_layers if pag_applied_layers is None else _as_list(pag_applied_layers)
        self_attentions(self.transformer, layers)
        self._pag_layers, self._pag_scale, self._pag_adaptive_scale = layers, pag_scale, pag_adaptive_scale

    def _denoise(self, latents: Tensor, timesteps: Tensor, tensors: dict[str, Any], **options: Any) -> Tensor:
        """The loop of `DenoisingLoop`, in which the last B images of each batch are perturbed."""
        self._is_perturbed = self.do_perturbed_attention_guidance
        if not self._is_perturbed:
            return super()._denoise(latents, timesteps, tensors, **options)
        if "cfg_parallel" in hooks_of(self.transformer):
            raise RuntimeError(
                "`cfg_parallel` cannot be combined with perturbed-attention guidance, which goes by the place in the "
                "batch. Set `pag_scale=0`, or leave the block of `cfg_parallel`."
            )
        with perturbed(self_attentions(self.transformer, self._pag_layers), len(latents)):
            return super()._denoise(latents, timesteps, tensors, **options)

    def _texts(self, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The texts of `DenoisingLoop`, and those of the prompts, which stand last, once more."""
        embeds, mask = super()._texts(tensors)
        if not self._is_perturbed:
            return embeds, mask
        num_images = len(tensors["prompt_embeds"])
        return torch.cat([embeds, embeds[-num_images:]]), torch.cat([mask, mask[-num_images:]])

    def _step(
        self, prediction: Tensor, t: Tensor, latents: Tensor, is_guided: bool, step_kwargs: dict[str, Any]
    ) -> Tensor:
        """The step of `DenoisingLoop` from predictions that are all shifted by `pag_scale * (c - p)`.

        A shift of both u and c is one of what classifier-free guidance makes of them.
        """
        if self._is_perturbed:
            *others, perturbed_prediction = prediction.float().chunk(2 + is_guided)
            shift = self._pag_weight(t) * (others[-1] - perturbed_prediction)
            prediction = torch.cat([other + shift for other in others])
        return super()._step(prediction, t, latents, is_guided, step_kwargs)

    def _pag_weight(self, t: Tensor) -> float | Tensor:
        """`pag_scale` at timestep `t` in [0, 1000]; adaptive scaling takes it back from the first step to the last."""
        if self._pag_adaptive_scale == 0:
            return self._pag_scale
        return (self._pag_scale - self._pag_adaptive_scale * (1000 - t)).clamp(min=0)


def self_attentions(transformer: nn.Module, layers: Sequence[str | int]) -> list[nn.Module]:
    """The self-attentions in the layers, in the order of the model; each once.

    Args:
        transformer: ours or diffusers'.
        layers: numbers of blocks, or names: one or more whole components of the names of modules, so that
            "transformer_blocks.1" is not "transformer_blocks.10".

    Raises:
        ValueError: a layer without any.
    """
    named = {
        name: module
        for name, module in transformer.named_modules()
        if getattr(module, "is_cross_attention", None) is False
    }
    chosen = set()
    for layer in layers:
        path = f"transformer_blocks.{layer}" if isinstance(layer, Integral) else layer
        found = [name for name in named if f".{path}." in f".{name}."]
        if not found:
            raise ValueError(
                "`pag_applied_layers` must be numbers of transformer blocks, or names of modules with a self-attention"
                f" in them, got {layer!r}. Take one of {list(named)}, or the beginning of one."
            )
        chosen.update(found)
    return [module for name, module in named.items() if name in chosen]


@contextmanager
def perturbed(attentions: Sequence[Any], num_perturbed: int) -> Iterator[None]:
    """For the time of the block, the attentions are the identity for the last `num_perturbed` images of a batch."""
    processors = [attention.processor for attention in attentions]
    try:
        for attention, processor in zip(attentions, processors, strict=True):
            attention.set_processor(SanaPAGAttnProcessor(processor, num_perturbed))
        yield
    finally:
        for attention, processor in zip(attentions, processors, strict=True):
            attention.set_processor(processor)


def _as_list(layers: Any) -> list[str | int]:
    as_list = [layers] if isinstance(layers, str | Integral) else layers
    if not isinstance(as_list, Sequence) or not all(isinstance(layer, str | Integral) for layer in as_list):
        raise TypeError(
            "`pag_applied_layers` must be the number or the name of a layer, such as 'transformer_blocks.8', or a "
            f"list of these, got {layers!r}."
        )
    return list(as_list)
