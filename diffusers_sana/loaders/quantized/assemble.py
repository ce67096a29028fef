"""Builds a model from converted tensors: the last step for all third-party 4-bit checkpoints."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from diffusers_sana.kernels.low_bit import precision_of
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer
from diffusers_sana.quantizers.svdquant.algorithm.decompose import QuantizedWeight
from diffusers_sana.quantizers.svdquant.api import mark_quantized
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.linear import replace_layer
from diffusers_sana.quantizers.svdquant.targets import as_patterns


@dataclass
class Conversion:
    """The result of a converter. Layers are stored in our layout at once, so that few are unpacked at a time.

    Attributes:
        dtype: of all floating-point tensors.
        layers: the quantized layers, by their names in the model.
        biases: of the layers that have one.
        weight_only: names of layers with 16-bit activations.
        unquantized: 16-bit tensors whose names or order differ in the file, by their keys in the model.
    """

    dtype: torch.dtype
    layers: dict[str, QuantizedWeight] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    weight_only: set[str] = field(default_factory=set)
    unquantized: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, layer: UnpackedLayer) -> None:
        """Adds a quantized layer."""
        self.layers[name] = layer.to_quantized_weight(self.dtype)
        if layer.bias is not None:
            self.biases[name] = layer.bias
        if layer.weight_only:
            self.weight_only.add(name)


def block_names(shapes: Iterable[str], container: str) -> list[str]:
    """Names of the blocks in a module list of the model, in order."""
    matches = (re.match(rf"{container}\.(\d+)\.", key) for key in shapes)
    return [f"{container}.{index}" for index in sorted({int(match[1]) for match in matches if match})]


def matrix_shape(shapes: Mapping[str, torch.Size], name: str) -> tuple[int, int]:
    """Output and input features of a layer.

    Raises:
        ValueError: the model has no such layer.
    """
    shape = shapes.get(f"{name}.weight")
    if shape is None:
        raise ValueError(f"the model has no layer {name!r}. The checkpoint is for a different architecture.")
    return shape[0], shape[1]


def all_tensors(
    conversion: Conversion, source: Source, shapes: Mapping[str, torch.Size], ignored: Sequence[str]
) -> dict[str, Tensor]:
    """The state dict of the quantized model.

    Args:
        conversion: of `source`.
        source: what the converter read from; tensors that it left must have the model's own keys.
        shapes: of the state dict of the 16-bit model.
        ignored: suffixes of keys that are not needed.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape, or has values that the dtype cannot represent.
    """
    tensors: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        name, _, part = key.rpartition(".")
        if name not in conversion.layers:
            tensors[key] = conversion.unquantized[key] if key in conversion.unquantized else source.take(key, shape)
        elif part == "bias" and name not in conversion.biases:
            raise ValueError(f"{source.origin} must have a bias for {key!r}, but has none. The file is incomplete.")
    for name, bias in conversion.biases.items():
        if f"{name}.bias" in shapes:
            tensors[f"{name}.bias"] = bias
        elif bias.any():
            raise ValueError(f"{source.origin} has a bias for {name!r}, but the layer of the model has none.")
    source.check_all_read(ignored)
    tensors = {key: tensor.to(conversion.dtype) for key, tensor in tensors.items()}
    for name, item in conversion.layers.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in item.tensors().items()}
    for key, tensor in tensors.items():
        # fp16 cannot represent all bf16 values.
        if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32) and not tensor.isfinite().all():
            raise ValueError(f"{key!r} must be finite in {conversion.dtype}, but is not. Use another `dtype`.")
    # Views of one tensor of the file become separate tensors, which can be saved, moved and modified one by one.
    return {key: torch.clone(tensor, memory_format=torch.contiguous_format) for key, tensor in tensors.items()}


def empty_model(model_cls: type[Any] | None, config: Mapping[str, Any], class_name: str) -> nn.Module:
    """The 16-bit model on the meta device, with real buffers.

    Args:
        model_cls: its class, or None for the diffusers class named `class_name`.
        config: its config.
        class_name: the class that the checkpoint names.

    Raises:
        ValueError: no such class.
    """
    cls = model_cls or getattr(diffusers, class_name, None)
    if cls is None:
        raise ValueError(
            f"`model_cls` must be given: the checkpoint names {class_name!r}, which diffusers does not have."
        )
    with init_empty_weights():
        return cls.from_config(dict(config))


def fill_model(model: nn.Module, conversion: Conversion, state: Mapping[str, Tensor]) -> None:
    """Fills a model on the meta device with a state dict from `all_tensors`."""
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
