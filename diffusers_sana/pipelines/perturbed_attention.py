"""Perturbed-attention guidance (PAG, arXiv 2403.17377): away from what the model
predicts with some self-attentions off.

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
from diffusers_sana.locks import exclusive
from diffusers_sana.models.layers import hooks_of
from diffusers_sana.models.transformers.attention_sana import SanaPAGAttnProcessor
from diffusers_sana.pipelines.call import Call
from diffusers_sana.pipelines.sampling import Denoiser, TextInputs, both_texts, predict_flow


# Spelt out as far as diffusers' check of arguments can follow.
PAGLayers = str | int | Sequence[str] | Sequence[int]

DEFAULT_PAG_LAYERS = "transformer_blocks.0"


def check_pag(pag_scale: float, pag_adaptive_scale: float) -> None:
    """Raises where the weights of a call are not numbers of at least 0."""
    for name, value in (("pag_scale", pag_scale), ("pag_adaptive_scale", pag_adaptive_scale)):
        check_number(name, value)
        if value < 0:
            raise ValueError(f"`{name}` must not be negative, got {value}. 0 turns it off.")


def perturbed_texts(tensors: dict[str, Any], is_guided: bool) -> tuple[Tensor, Tensor]:
    """Features and mask of `both_texts`, and those of the prompts, which stand last, once more."""
    embeds, mask = both_texts(tensors, is_guided)
    num_images = len(tensors["prompt_embeds"])
    return torch.cat([embeds, embeds[-num_images:]]), torch.cat([mask, mask[-num_images:]])


def predict_perturbed(
    model: Denoiser, latents: Tensor, t: Tensor, text: TextInputs, attentions: Sequence[Any]
) -> Tensor:
    """Predictions `[B or 2 B, C, h, w]` in fp32 of the prompts and negative prompts, each shifted by `s (c - p)`.

    A shift of both u and c is a shift of what classifier-free guidance makes of them.
    """
    with exclusive(model.transformer), perturbed(attentions, len(latents)):
        prediction = predict_flow(model, latents, t, text)
    *others, perturbed_prediction = prediction.float().chunk(2 + text.is_guided)
    shift = _weight(model.call, t) * (others[-1] - perturbed_prediction)
    return torch.cat([other + shift for other in others])


def _weight(call: Call, t: Tensor) -> float | Tensor:
    """`pag_scale` at timestep `t` in [0, 1000]; adaptive scaling takes it back from the first step to the last."""
    if call.pag_adaptive_scale == 0:
        return call.pag_scale
    return (call.pag_scale - call.pag_adaptive_scale * (1000 - t)).clamp(min=0)


def check_no_cfg_parallel(transformer: nn.Module) -> None:
    """Raises within `cfg_parallel`, whose processes do not see the whole batch."""
    if "cfg_parallel" in hooks_of(transformer):
        raise RuntimeError(
            "`cfg_parallel` cannot be combined with perturbed-attention guidance, which goes by the place in the "
            "batch. Set `pag_scale=0`, or leave the block of `cfg_parallel`."
        )


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


def pag_layers_of(layers: Any) -> list[str | int]:
    """The argument `pag_applied_layers` as a list. Raises TypeError where it is neither names nor numbers."""
    as_list = [layers] if isinstance(layers, str | Integral) else layers
    if not isinstance(as_list, Sequence) or not all(isinstance(layer, str | Integral) for layer in as_list):
        raise TypeError(
            "`pag_applied_layers` must be the number or the name of a layer, such as 'transformer_blocks.8', or a "
            f"list of these, got {layers!r}."
        )
    return list(as_list)
