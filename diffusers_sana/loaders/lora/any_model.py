"""Adapters of any kind on any model of diffusers, such as FLUX, Qwen-Image or SDXL, in 16 or 4 bits.

diffusers reads plain LoRA files of these models. What it refuses or drops (DoRA of trainers other than PEFT, LoHa,
OFT, BOFT, whole weights, most LoKr) is read here by the rules of `formats.py`. A layer of the file is looked up among
those of the model, by its diffusers name with dots or underscores, or for FLUX.1 by its original name.
"""

import math
import re
from pathlib import Path
from typing import Any

from diffusers.utils import get_adapter_name
from torch import Tensor, nn

from diffusers_sana.loaders.lora.files import named, read_lora
from diffusers_sana.loaders.lora.formats import (
    ANY_PREFIX,
    PREFIX,
    Place,
    check_lora_fits,
    convert_layers,
    convert_sana_lora,
    layers_of,
)


ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")
# Original layers of FLUX.1, also fused ones, and of Chroma -> those of diffusers.
FLUX = {
    "double": {
        "img_attn_qkv": ATTENTION,
        "img_attn_proj": ("attn.to_out.0",),
        "img_mlp_0": ("ff.net.0.proj",),
        "img_mlp_2": ("ff.net.2",),
        "img_mod_lin": ("norm1.linear",),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn_proj": ("attn.to_add_out",),
        "txt_mlp_0": ("ff_context.net.0.proj",),
        "txt_mlp_2": ("ff_context.net.2",),
        "txt_mod_lin": ("norm1_context.linear",),
    },
    "single": {"linear1": (*ATTENTION, "proj_mlp"), "linear2": ("proj_out",), "modulation_lin": ("norm.linear",)},
}
FLUX_BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
FLUX_LAYER = re.compile(r"(double|single)_blocks_(\d+)_(.+)")
OF_MODEL = re.compile(r"unet[._](?!blocks)")  # as diffusers calls the model of SDXL


def load_adapter(
    model: Any,
    source: str | Path | dict[str, Tensor],
    adapter_name: str | None = None,
    *,
    weight_name: str | None = None,
    use_safetensors: bool | None = None,
    **kwargs: Any,
) -> str:
    """Puts an adapter of any kind beside the layers of a model; diffusers' calls then work with it as with a LoRA.

    For example `load_adapter(pipe.transformer, "lokr.safetensors", "style")`, then `pipe.set_adapters("style", 0.8)`,
    `pipe.fuse_lora()` or `pipe.unload_lora_weights()`. Call it before offloading is enabled. The pipelines of Sana do
    the same in `load_lora_weights`.

    Args:
        model: a transformer or U-Net of diffusers, dense or quantized.
        source: a file, a folder or an id on the Hub with one, or what is in such a file.
        adapter_name: a new name; None for "default_0" and so on.
        weight_name: of the file in the folder or on the Hub.
        use_safetensors: True for files of safetensors alone, False for `.bin`, None for either.
        kwargs: `FILE_ARGUMENTS` of `files.py`, such as `subfolder`.

    Returns:
        The name of the adapter.

    Raises:
        TypeError: `model` is none of diffusers.
        ValueError: naming a key that belongs to no layer of the model, or does not fit it; or the name is taken.
        OSError: there is no such file, or it is damaged.
    """
    from diffusers_sana.loaders.lora.layers import load_into_model

    if not hasattr(model, "load_lora_adapter"):
        raise TypeError(
            f"`model` must be a model of diffusers, such as `pipe.transformer`, got {type(model).__name__}."
        )
    adapter_name = adapter_name or get_adapter_name(model)
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"`adapter_name` must be new, but the model has an adapter {adapter_name!r}.")
    with named(source, weight_name, kwargs.get("subfolder")):
        state_dict, metadata = read_lora(source, weight_name, use_safetensors, **kwargs)
        if type(model).__name__ == "SanaTransformer2DModel":
            converted, fields = convert_sana_lora(state_dict, metadata)
            converted = {key: tensor for key, tensor in converted.items() if key.startswith(PREFIX)}
        else:
            places = _Places(model)
            converted, fields = convert_layers(state_dict, metadata, layers_of(state_dict, None), places.find)
        check_lora_fits(converted, model)
        load_into_model(model, converted, fields, adapter_name, PREFIX)
    return adapter_name


class _Places:
    """The layers of a model, by the names that they may have in a file."""

    def __init__(self, model: nn.Module):
        self.model = model
        layers = {name.removesuffix(".base_layer"): module for name, module in model.named_modules()}
        kinds = nn.Linear | nn.Conv2d
        self.layers: dict[str, Any] = {
            name: module for name, module in layers.items() if isinstance(module, kinds) and ".lora_" not in name
        }
        self.names = {name.replace(".", "_"): name for name in self.layers}

    def find(self, layer: str, key: str) -> Place:
        """The place of a layer in the file; raises ValueError, naming the key, where the model has none."""
        flat = OF_MODEL.sub("", ANY_PREFIX.sub("", layer, count=1), count=1).replace(".", "_")
        names: tuple[str, ...] = (self.names[flat],) if flat in self.names else ()
        if original := FLUX_LAYER.fullmatch(flat):
            kind, index, rest = original.groups()
            names = tuple(f"{FLUX_BLOCKS[kind]}.{index}.{name}" for name in FLUX[kind].get(rest, ()))
        if not names or not self.layers.keys() >= set(names):
            raise ValueError(
                f"{key!r} is not a layer of this {type(self.model).__name__}. The file is for a different model, or "
                "has other names for its layers; plain LoRA files in formats that diffusers knows load by "
                "`pipe.load_lora_weights`."
            )
        module = self.layers[names[0]]
        is_conv = isinstance(module, nn.Conv2d)
        outputs = [self.layers[name].weight.shape[0] for name in names]
        ratio = tuple(size // math.gcd(*outputs) for size in outputs)
        return Place(names, ratio, is_conv, is_conv and module.groups > 1)
