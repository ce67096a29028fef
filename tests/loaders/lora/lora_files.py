"""One random LoRA for a tiny Sana, as trainers write it. The layers' names are written out here once more.

Some layers have their own rank and alpha, and the parts of what the authors fuse have one A, so that every
format can hold it. Scales are powers of two, so that applying them first or last gives the same bits.

The rules are those of the writers: OneTrainer (`LoRASaverMixin`, and its older files for Sana, which have dots behind
`lora_transformer`), LyCORIS (`save_weights`), SimpleTuner (its export for ComfyUI), diffusers and PEFT.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests import tiny
from tests.loaders.nvlabs.official_files import FUSED, SANA_NAMES


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


def random_lora(transformer: nn.Module, seed: int = 0, depthwise: bool = False) -> Layers:
    """For every layer; for the depthwise convolutions, which diffusers cannot hold, only if asked for.

    There it is one ungrouped pair, as in OneTrainer: A `[r, channels, 3, 3]`, B `[1, r, 1, 1]`.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: Layers = {}
    for name, layer in transformer.named_modules():
        is_depthwise = name.endswith("conv_depth")
        if not isinstance(layer, nn.Linear | nn.Conv2d) or (is_depthwise and not depthwise):
            continue
        outputs, inputs, *kernel = layer.weight.shape
        if is_depthwise:
            outputs, inputs = 1, outputs
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
    "OneTrainer": lambda layers: written(layers, "lora_transformer."),  # until July 2026
    "OneTrainer's backups": lambda layers: written(layers, "transformer."),
    "kohya": lambda layers: written(layers, "lora_unet_", "_"),  # by OneTrainer
    "OneTrainer, original": lambda layers: written(layers, "", **AB),
    "OneTrainer and SimpleTuner for ComfyUI": lambda layers: written(layers, "diffusion_model.", **AB),
    "LyCORIS": lambda layers: written(layers, "lycoris_", "_"),
    "ComfyUI": lambda layers: written(by_authors_names(layers), "diffusion_model."),  # by us
    # Of no known writer, but of the same parts as those above.
    "authors' names": lambda layers: written(by_authors_names(layers), ""),
    "authors' names, flat": lambda layers: written(by_authors_names(layers), "lora_unet_", "_"),
    "authors' names, A and B": lambda layers: written(by_authors_names(layers), "diffusion_model.", **AB),
    "lora_transformer, flat": lambda layers: written(layers, "lora_transformer_", "_"),
    "transformer, flat": lambda layers: written(layers, "transformer_", "_"),
    "lycoris, dotted": lambda layers: written(layers, "lycoris."),
    "lora_unet, dotted": lambda layers: written(layers, "lora_unet.", ".", **AB),
    "diffusers before PEFT": lambda layers: written(layers, "transformer.", ".", "lora.down.weight", "lora.up.weight"),
}
