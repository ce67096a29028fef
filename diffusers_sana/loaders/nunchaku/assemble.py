"""From converted tensors to a model: the end that all third-party 4-bit checkpoints have in common."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from diffusers_sana.kernels.low_bit import precision_of
from diffusers_sana.loaders.nunchaku.layers import Source, UnpackedLayer
from diffusers_sana.quantizers.svdquant.algorithm.decompose import QuantizedWeight
from diffusers_sana.quantizers.svdquant.api import mark_quantized
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.linear import replace_layer
from diffusers_sana.quantizers.svdquant.targets import as_patterns


@dataclass
class Conversion:
    """What a converter has found, layer by layer in our layout, so that no layer is in memory unpacked for long.

    Attributes:
        dtype: of all floating-point tensors.
        layers: the quantized layers, by their names in the model.
        biases: of those that have one.
        weight_only: those whose activations stay 16 bit.
        rest: 16-bit tensors that have other names or another order in the file, by their keys in the model.
    """

    dtype: torch.dtype
    layers: dict[str, QuantizedWeight] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    weight_only: set[str] = field(default_factory=set)
    rest: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, layer: UnpackedLayer, weight_only: bool = False) -> None:
        """Takes down a quantized layer."""
        self.layers[name] = layer.native(self.dtype)
        if layer.bias is not None:
            self.biases[name] = layer.bias
        if weight_only:
            self.weight_only.add(name)


def block_names(shapes: Iterable[str], container: str) -> list[str]:
    """The blocks in a list of the model, in order."""
    matches = (re.match(rf"{container}\.(\d+)\.", key) for key in shapes)
    return [f"{container}.{index}" for index in sorted({int(match[1]) for match in matches if match})]


def matrix_shape(shapes: Mapping[str, torch.Size], name: str) -> tuple[int, int]:
    """Output and input features of a layer.

    Raises:
        ValueError: no such layer.
    """
    shape = shapes.get(f"{name}.weight")
    if shape is None:
        raise ValueError(f"the model must have a layer {name!r}, but has not. The file is of another model.")
    return shape[0], shape[1]


def all_tensors(
    conversion: Conversion, source: Source, shapes: Mapping[str, torch.Size], ignored: str
) -> dict[str, Tensor]:
    """The state dict of the quantized model.

    Args:
        conversion: of `source`.
        source: what the converter read from; what it left must have the model's own keys.
        shapes: of the state dict of the 16-bit model.
        ignored: how keys end that nobody needs.

    Raises:
        ValueError: a tensor missing, left over or of another shape, numbers that the dtype cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        name, _, part = key.rpartition(".")
        if name not in conversion.layers:
            tensors[key] = conversion.rest[key] if key in conversion.rest else source.take(key, shape)
        elif part == "bias" and name not in conversion.biases:
            raise ValueError(f"{source.origin} must have a bias for {key!r}, but has not. It is not whole.")
    for name, bias in conversion.biases.items():
        if f"{name}.bias" in shapes:
            tensors[f"{name}.bias"] = bias
        elif bias.any():
            raise ValueError(f"{source.origin} has a bias for {name!r}, but this layer of the model has none.")
    source.check_all_read(ignored)
    tensors = {key: tensor.to(conversion.dtype) for key, tensor in tensors.items()}
    for name, item in conversion.layers.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in item.tensors().items()}
    for key, tensor in tensors.items():
        # fp16 may be too small for what was bf16.
        if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32) and not tensor.isfinite().all():
            raise ValueError(f"{key!r} must be finite in {conversion.dtype}, but is not. Pass another `torch_dtype`.")
    # Parts of one tensor of the file become tensors of their own: they can be saved, moved and written to one by one.
    return {key: torch.clone(tensor, memory_format=torch.contiguous_format) for key, tensor in tensors.items()}


def empty_model(model_cls: type[Any] | None, config: Mapping[str, Any], class_name: str) -> nn.Module:
    """The 16-bit model on the meta device; buffers have their numbers.

    Args:
        model_cls: its class, or None for the one of diffusers with the name `class_name`.
        config: its config.
        class_name: what the checkpoint says.

    Raises:
        ValueError: no such class.
    """
    cls = model_cls or getattr(diffusers, class_name, None)
    if cls is None:
        raise ValueError(f"`model_cls` must be given: the checkpoint names {class_name!r}, which diffusers has not.")
    with init_empty_weights():
        return cls.from_config(dict(config))


def fill_model(model: nn.Module, conversion: Conversion, state: Mapping[str, Tensor]) -> None:
    """Puts a state dict from `all_tensors` into a model on the meta device, which can then be saved."""
    modes = {name: "w4a16" if name in conversion.weight_only else "w4a4" for name in conversion.layers}
    quantized = [item for name, item in conversion.layers.items() if modes[name] == "w4a4"]
    quantized = quantized or list(conversion.layers.values())
    config = SVDQuantConfig(
        precision=precision_of(quantized[0].wscales),
        rank=min(item.proj_down.shape[0] for item in quantized),
        modules=as_patterns(modes, model),
    )
    for name, item in conversion.layers.items():
        replace_layer(model, name, item, modes[name], config.compute_mode)
    model.load_state_dict(state, strict=True, assign=True)
    model.eval()
    mark_quantized(model, config)
