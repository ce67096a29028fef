"""Builds a model from converted tensors: the last step for all third-party 4-bit checkpoints."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from diffusers_sana.kernels.low_bit import precision_of
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer
from diffusers_sana.loaders.quantized.names import Scheme, file_names
from diffusers_sana.quantizers.svdquant.algorithm.quantized_weight import QuantizedWeight
from diffusers_sana.quantizers.svdquant.api import mark_quantized
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig, mode_for
from diffusers_sana.quantizers.svdquant.layers.linear import replace_layer
from diffusers_sana.quantizers.svdquant.targets import as_patterns


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALWAYS_16_BIT = (".lora_down", ".proj_down", ".wzeros", ".svdquant_lora_a", "_proj_down")  # the checkpoint's dtype
ALWAYS_32_BIT = (".weight_scale",)  # of ComfyUI's 8-bit layers


@dataclass
class Conversion:
    """The result of a converter. Layers are stored in our layout at once, so that few are unpacked at a time.

    Attributes:
        dtype: of all floating-point tensors.
        layers: the quantized layers, by their names in the model.
        biases: of the layers that have one.
        weight_only: names of layers with 16-bit activations.
        input_scales: static scales of inputs, of layers that have one.
        unquantized: 16-bit tensors whose names or order differ in the file, by their keys in the model.
    """

    dtype: torch.dtype
    layers: dict[str, QuantizedWeight] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    weight_only: set[str] = field(default_factory=set)
    input_scales: dict[str, float] = field(default_factory=dict)
    unquantized: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, layer: UnpackedLayer) -> None:
        """Adds a quantized layer."""
        self.layers[name] = layer.to_quantized_weight(self.dtype)
        if layer.bias is not None:
            self.biases[name] = layer.bias
        if layer.weight_only:
            self.weight_only.add(name)
        if layer.input_scale is not None:
            self.input_scales[name] = layer.input_scale


# From the tensors of a file, the shapes of the state dict of the 16-bit model, and the dtype of all floating-point
# tensors, to the converted layers. Raises a ValueError that names a tensor if it is missing or has another shape.
Converter = Callable[[Source, Mapping[str, torch.Size], torch.dtype], Conversion]


@dataclass
class Reading:
    """How a checkpoint becomes a model.

    Attributes:
        convert: from the tensors to layers.
        tensors: by the keys that `convert` expects.
        ignored: suffixes of keys that are not needed.
    """

    convert: Converter
    tensors: Mapping[str, Tensor]
    ignored: Sequence[str] = ()


def block_names(shapes: Iterable[str], container: str) -> list[str]:
    """Names of the blocks in a module list of the model, in order."""
    matches = (re.match(rf"{container}\.(\d+)\.", key) for key in shapes)
    return [f"{container}.{index}" for index in sorted({int(match[1]) for match in matches if match})]


def convert_by_names(
    source: Source,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    scheme: Scheme,
    read: Callable[[str, int, int], UnpackedLayer | dict[str, Tensor] | None],
    may_be_16_bit: bool = False,
) -> Conversion:
    """Converts a file whose layers are those of the model, some of them fused or renamed.

    Args:
        source: the tensors; what stays unread has the model's own keys.
        shapes: of the state dict of the 16-bit model.
        dtype: of the result.
        scheme: names in the file.
        read: from the name of a layer in the file, N and K to the layer, to its tensors in 16 bits, or to None if it
            is not quantized.
        may_be_16_bit: whether the result may have no quantized layer.
    """
    out = Conversion(dtype)
    names = dict.fromkeys(key.rpartition(".")[0] for key in shapes)
    in_file = {key.rpartition(".")[0] for key in source.tensors}
    for place, members in file_names(names, scheme, in_file).items():
        if f"{members[0]}.weight" not in shapes:
            continue  # parameters without a module
        rows = [shapes[f"{name}.weight"][0] for name in members]
        is_matrix = len(shapes[f"{members[0]}.weight"]) > 1
        layer = read(place, sum(rows), shapes[f"{members[0]}.weight"][1]) if is_matrix else None
        start = 0
        for name, size in zip(members, rows, strict=True):
            part = slice(start, start + size)
            start += size
            if isinstance(layer, UnpackedLayer):
                out.add(name, layer.rows(part))
                continue
            if layer is not None:
                out.unquantized |= {f"{name}.{leaf}": tensor[part] for leaf, tensor in layer.items()}
                continue
            for key in (key for key in shapes if place != name and key.rpartition(".")[0] == name):
                leaf = key.rpartition(".")[2]
                out.unquantized[key] = source.take(f"{place}.{leaf}", (sum(rows), *shapes[key][1:]))[part]
    if not out.layers and not may_be_16_bit:
        raise ValueError(f"{source.origin} must have at least one quantized layer of the model, but has none.")
    return out


def assemble(
    model: nn.Module, convert: Converter, source: Source, dtype: torch.dtype, ignored: Sequence[str] = ()
) -> nn.Module:
    """Converts tensors and fills a 16-bit model on the meta device with them.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape, or has values that `dtype` cannot represent.
    """
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    conversion = convert(source, shapes, dtype)
    fill_model(model, conversion, all_tensors(conversion, source, shapes, ignored))
    return model


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError for a dtype in which no model can be loaded."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"`dtype` must be one of {DTYPES} or None, got {dtype!r}.")


def stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of a checkpoint: that of its low-rank branches or zero points, else of most tensors."""
    found = Counter(
        tensor.dtype for key, tensor in tensors.items() if tensor.dtype in DTYPES and not key.endswith(ALWAYS_32_BIT)
    )
    sure = Counter(tensor.dtype for key, tensor in tensors.items() if key.endswith(ALWAYS_16_BIT))
    return next(iter((sure or found).most_common(1)), (torch.bfloat16, 0))[0]


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
            f"`model_cls` or `base` must be given: the checkpoint names {class_name!r}, which diffusers does not have."
        )
    with init_empty_weights():
        return cls.from_config(dict(config))


def fill_model(model: nn.Module, conversion: Conversion, state: Mapping[str, Tensor]) -> None:
    """Fills a model on the meta device with a state dict from `all_tensors`."""
    if not conversion.layers:
        model.load_state_dict(state, strict=True, assign=True)
        model.eval()
        return
    precisions = {name: precision_of(item.wscales, item.qweight) for name, item in conversion.layers.items()}
    modes = {
        name: mode_for(precision, "w4a16" if name in conversion.weight_only else "w4a4")
        for name, precision in precisions.items()
    }
    # The format of the layers with quantized activations, of which 4-bit ones have the first say.
    first = min(modes, key=lambda name: (modes[name].endswith("a16"), not modes[name].startswith("w4")))
    quantized = [item for name, item in conversion.layers.items() if modes[name] == modes[first]]
    config = SVDQuantConfig(
        precision=precisions[first],
        rank=min(item.proj_down.shape[0] for item in quantized),
        modules=as_patterns(modes, model),
    )
    for name, item in conversion.layers.items():
        replace_layer(model, name, item, modes[name], config.compute_mode).input_scale = conversion.input_scales.get(
            name
        )
    model.load_state_dict(state, strict=True, assign=True)
    model.eval()
    mark_quantized(model, config)
