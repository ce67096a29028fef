"""One random LoRA for a tiny Sana, as different trainers write it. The layers' names are written out here once more.

It has a rank and an alpha of its own for some layers, and the parts of what the authors fuse have one A, so that every
format can hold it. Scales are powers of two, so that applying them first or last gives the same bits.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests import tiny
from tests.loaders.official_files import FUSED, SANA_NAMES


WIDTH = 64
Layers = dict[str, tuple[Tensor, Tensor, float]]  # name -> A, B, alpha
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": WIDTH // 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": WIDTH // 2,
    "cross_attention_dim": WIDTH,
}


def pipeline(library, **kwargs):
    """A tiny pipeline that the LoRA fits."""
    return tiny.pipeline(library, **{**TRANSFORMER, **kwargs})


def random_lora(transformer: nn.Module, seed: int = 0) -> Layers:
    """For every layer but the depthwise convolutions."""
    generator = torch.Generator().manual_seed(seed)
    layers: Layers = {}
    for name, layer in transformer.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or name.endswith("conv_depth"):
            continue
        outputs, inputs, *kernel = layer.weight.shape
        rank = 4 if name.endswith("conv_point") else 2
        down = torch.randn(rank, inputs, *kernel, generator=generator) * 0.3
        up = torch.randn(outputs, rank, *[1] * len(kernel), generator=generator) * 0.3
        first = re.sub(r"(attn1\.to_)[kv]$", r"\1q", re.sub(r"(attn2\.to_)v$", r"\1k", name))
        alpha = 0.5 if ".attn2" in first else 1.0
        layers[name] = (layers[first][0] if first in layers else down, up, alpha)
    return layers


def plain(layers: Layers) -> dict[str, Tensor]:
    """diffusers' format, with the scales in B."""
    out = {}
    for name, (down, up, alpha) in layers.items():
        out[f"transformer.{name}.lora_A.weight"] = down.clone()  # safetensors share no memory
        out[f"transformer.{name}.lora_B.weight"] = up * (alpha / down.shape[0])
    return out


def written(
    layers: Layers, prefix: str, separator: str = ".", down: str = "lora_down.weight", up: str = "lora_up.weight"
) -> dict[str, Tensor]:
    """With an alpha a layer."""
    out = {}
    for name, (first, second, alpha) in layers.items():
        stem = prefix + name.replace(".", separator)
        out |= {f"{stem}.alpha": torch.tensor(alpha), f"{stem}.{down}": first.clone(), f"{stem}.{up}": second}
    return out


def by_authors_names(layers: Layers) -> Layers:
    """The same product in the layers that the authors' model has."""
    left, out = dict(layers), {}
    for pattern, (fused, letters) in FUSED.items():
        first = f".{pattern.format(letters[0])}"
        for name in [name for name in left if name.endswith(first)]:
            parts = [left.pop(name.replace(first, f".{pattern.format(letter)}")) for letter in letters]
            (down, _, alpha), up = parts[0], torch.cat([up for _, up, _ in parts])
            out[_block(name.replace(first, f".{fused}"))] = down, up, alpha
    for name, layer in left.items():
        match = re.fullmatch(r"(transformer_blocks\.\d+\.)?(.+)", name)
        out[_block((match[1] or "") + SANA_NAMES[match[2]])] = layer
    return out


def _block(name: str) -> str:
    return name.replace("transformer_blocks.", "blocks.")


AB = {"down": "lora_A.weight", "up": "lora_B.weight"}
FORMATS: dict[str, Callable[[Layers], dict[str, Tensor]]] = {
    "kohya": lambda layers: written(layers, "lora_unet_", "_"),
    "kohya, authors' names": lambda layers: written(by_authors_names(layers), "lora_unet_", "_"),
    "OneTrainer": lambda layers: written(layers, "lora_transformer_", "_"),
    "LyCORIS, SimpleTuner": lambda layers: written(layers, "lycoris_", "_"),
    "ComfyUI": lambda layers: written(by_authors_names(layers), "diffusion_model."),
    "ComfyUI, A and B": lambda layers: written(by_authors_names(layers), "diffusion_model.", **AB),
    "SimpleTuner for ComfyUI": lambda layers: written(layers, "diffusion_model.", **AB),
    "authors' names alone": lambda layers: written(by_authors_names(layers), ""),
    "diffusers before PEFT": lambda layers: written(layers, "transformer.", ".", "lora.down.weight", "lora.up.weight"),
}
