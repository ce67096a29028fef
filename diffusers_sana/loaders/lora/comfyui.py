"""Writes a LoRA of Sana with the original layer names, for programs that run the original model, such as ComfyUI.

`formats.py` is the other direction.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.loaders.lora.formats import (
    DEPTHWISE,
    DOWN,
    GUIDED_TIME,
    PREFIX,
    TEXT_PREFIX,
    TIME,
    UNGUIDED_TIME,
    UP,
    convert_sana_lora,
    lora_scale,
)
from diffusers_sana.loaders.nvlabs.sana import BLOCK, TOP


COMFY_PREFIX = "diffusion_model."


def lora_to_comfyui(state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Converts a LoRA of Sana to the original layer names, as ComfyUI expects them for the original model.

    The parts of a fused layer become one LoRA whose rank is the sum of their ranks, block-diagonal and hence with the
    same product.

    Args:
        state_dict, metadata: a LoRA in any format; see `convert_sana_lora`.

    Returns:
        `diffusion_model.blocks.0.attn.qkv.lora_down.weight` and the like, with one `alpha` per layer.

    Raises:
        ValueError: see `convert_sana_lora`; DoRA, biases, and a LoRA of the depthwise convolutions or of the text
            encoder, which this format does not support.
    """
    ours, fields = convert_sana_lora(state_dict, metadata)
    for key in ours:
        if key.startswith(TEXT_PREFIX):
            raise ValueError(
                f"{key!r} changes the text encoder, which this format does not support. Leave such keys out."
            )
        if not key.endswith((DOWN, UP)):
            raise ValueError(
                f"{key!r} must be a factor of a plain LoRA: this format does not support DoRA and biases."
            )
        if DEPTHWISE in key:
            raise ValueError(
                f"{key!r} changes a depthwise convolution, which this format does not support. Train without it."
            )
    names = [key.removeprefix(PREFIX).removesuffix(f".{DOWN}") for key in ours if key.endswith(DOWN)]
    out: dict[str, Tensor] = {}
    for original, parts in _by_original_names(names).items():
        present = [name for name in parts if name in names]
        downs = [ours[f"{PREFIX}{name}.{DOWN}"] for name in present]
        scales = [lora_scale(fields, name, down.shape[0]) for name, down in zip(present, downs, strict=True)]
        common = scales[0] or 1.0
        columns = [
            _at_rows(ours[f"{PREFIX}{name}.{UP}"] * (scale / common), parts.index(name), len(parts))
            for name, scale in zip(present, scales, strict=True)
        ]
        down, up = torch.cat(downs), torch.cat(columns, dim=1)
        out[f"{COMFY_PREFIX}{original}.lora_down.weight"] = down
        out[f"{COMFY_PREFIX}{original}.lora_up.weight"] = up
        out[f"{COMFY_PREFIX}{original}.alpha"] = torch.tensor(common * down.shape[0])
    return out


def _by_original_names(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Original layer -> all of our layers that it consists of, for the original layers that contain any of `names`."""
    fused_layers = {ours: (name, group) for name, group in BLOCK.items() for ours in group}
    top = {ours: name for name, ours in TOP.items()}
    top |= {prefix + ours: name for prefix in (GUIDED_TIME, UNGUIDED_TIME) for name, ours in TIME.items()}
    out: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name in top:
            out[top[name]] = (name,)
        else:
            _, index, layer = name.split(".", 2)
            fused, group = fused_layers[layer]
            out[f"blocks.{index}.{fused}"] = tuple(f"transformer_blocks.{index}.{part}" for part in group)
    return out


def _at_rows(column: Tensor, position: int, number: int) -> Tensor:
    """Columns of a fused layer's B: zero, except in one of `number` equal parts."""
    rows = [torch.zeros_like(column) for _ in range(number)]
    rows[position] = column
    return torch.cat(rows)
