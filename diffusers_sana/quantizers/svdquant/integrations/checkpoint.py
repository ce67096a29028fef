"""Loading a checkpoint into a model with SVDQuant layers: the part that diffusers and transformers have in common.

From a 16-bit checkpoint each weight is quantized when it arrives (`quantize_weight`). For a quantized checkpoint the
layers are replaced by empty ones first (`insert_empty_layers`), and each tensor is checked (`check_files`,
`check_tensor`, `check_layers`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusers_sana.checkpoint_files import meta_tensors
from diffusers_sana.kernels.rotation import GROUP, can_rotate, rotation_tensor
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.config import (
    FLOAT8_LAYOUT,
    INT8_LAYOUT,
    LAYOUT,
    ROTATED_LAYOUT,
    SVDQuantConfig,
)
from diffusers_sana.quantizers.svdquant.layers.linear import (
    SVDQuantLayer,
    empty_weight,
    replace_layer,
)
from diffusers_sana.quantizers.svdquant.targets import as_patterns, check_finite, find_targets, weight_shape


FULL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_request(config: SVDQuantConfig, pre_quantized: bool, device_map: Any) -> None:
    """Raises ValueError for requests that on-the-fly quantization does not support: `gptq` and weights on disk."""
    if pre_quantized:
        return
    if config.gptq:
        raise ValueError(
            "`gptq` must be False in `from_pretrained`, which has no calibration data, got True. Load the model first "
            "and quantize it with prompts."
        )
    if config.budget is not None:
        raise ValueError(
            f"`budget` must be None in `from_pretrained`, which quantizes one layer at a time, got {config.budget!r}. "
            "Load the model first, and call `diffusers_sana.quantize`."
        )
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise ValueError(
            "`device_map` must not put layers on disk while they are quantized. Quantize once without it, save the "
            "model, and load that."
        )


def check_layout(config: SVDQuantConfig) -> None:
    """Raises ValueError for a quantized folder of another runtime."""
    if config.layout is None:
        raise ValueError(
            "the model was quantized by another runtime than diffusers_sana, such as vLLM-Omni, which also calls its "
            "layout `svdquant`: the `quantization_config` has neither `layout` nor `modules`. Load it with "
            "`diffusers_sana.load_quantized`, or convert it once: `diffusers-sana convert FOLDER -o DIR --to "
            "diffusers-sana`."
        )


def check_no_adapters(names: Iterable[str]) -> None:
    """Raises ValueError for the state dict of a model with unfused adapters, whose file could not be loaded again."""
    if any(".base_layer." in name for name in names):
        raise ValueError(
            "the model cannot be saved while adapters are beside its layers: nothing could load the folder. Call "
            "`unload_lora_weights` before; to keep their effect, call `fuse_lora` before that. Adapters themselves "
            "are saved by `save_lora_weights`."
        )


def quantize_weight(model: nn.Module, name: str, weight: Tensor, mode: str, config: SVDQuantConfig) -> SVDQuantLayer:
    """Replaces a layer by one quantized from the given weight, on the device of the weight.

    The bias may be loaded before or after: it stays a parameter of the same name.

    Raises:
        ValueError: NaN or infinity in the weight.
    """
    original = cast(nn.Linear | nn.Conv2d, model.get_submodule(name))
    matrix = weight.detach().to(original.weight.dtype).flatten(1)
    check_finite(name, matrix)
    (quantized,), _ = decompose([matrix], config.for_layer(mode))
    return replace_layer(model, name, quantized, mode, config.compute_mode)


def insert_empty_layers(model: nn.Module, config: SVDQuantConfig) -> None:
    """Replaces the layers that a quantized checkpoint lists by quantized ones on the meta device.

    Raises:
        ValueError: see `find_targets`; the checkpoint then belongs to a different model.
    """
    for name, mode in find_targets(model, config).items():
        original = cast(nn.Linear | nn.Conv2d, model.get_submodule(name))
        layer = config.for_layer(mode)
        weight = empty_weight(
            *weight_shape(original),
            layer.rank,
            layer.precision,
            original.weight.dtype,
            rotation=config.rotation_of(name),
        )
        replaced = replace_layer(model, name, weight, mode, config.compute_mode)
        replaced.input_scale = (config.input_scales or {}).get(name)


def recorded_config(
    config: SVDQuantConfig, model: nn.Module, targets: Mapping[str, str] | None = None
) -> SVDQuantConfig:
    """The config that is saved with a model: layout, dtype and rotated layers, and `targets` where given."""
    modules = config.modules if targets is None else as_patterns(dict(targets), model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDQuantLayer)}
    sizes = {name: size for name, layer in layers.items() if (size := layer.rotation_size) is not None}
    rotated = as_patterns(sizes, model)
    is_usual = set(sizes.values()) <= {GROUP}
    scales = {name: layer.input_scale for name, layer in layers.items() if layer.input_scale is not None}
    precisions = {layer.precision for layer in layers.values()}
    if "float8" in precisions:
        layout = FLOAT8_LAYOUT
    elif "int8" in precisions or not is_usual:
        layout = INT8_LAYOUT
    else:
        layout = ROTATED_LAYOUT if rotated else LAYOUT
    first = next(iter(layers.values()), None)
    dtype = config.dtype if first is None else str(first.proj_up.dtype).removeprefix("torch.")
    return replace(
        config,
        modules=modules,
        layout=layout,
        dtype=dtype,
        rotated=list(rotated) if is_usual else rotated,
        input_scales=scales or None,
    )


def layer_of(model: nn.Module, tensor_name: str) -> tuple[SVDQuantLayer | None, str]:
    """The quantized layer that a tensor of the state dict belongs to, if any, and the name of the tensor in it."""
    name, _, leaf = tensor_name.rpartition(".")
    module = model.get_submodule(name)
    return (module if isinstance(module, SVDQuantLayer) else None), leaf


def check_tensor(name: str, expected: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError if shape or dtype of a tensor do not fit its layer. Any rank fits: adapters increase it."""
    leaf = name.rpartition(".")[2]
    expected_shape: list[int | str] = list(expected.shape)
    if leaf in ("proj_down", "proj_up"):
        expected_shape[0 if leaf == "proj_down" else 1] = "rank"
    fits = len(expected_shape) == len(shape) and all(
        size in ("rank", actual) for size, actual in zip(expected_shape, shape, strict=True)
    )
    same_kind = dtype == expected.dtype or (dtype in FULL_DTYPES and expected.dtype in FULL_DTYPES)
    if not fits or not same_kind:
        raise ValueError(
            f"{name!r} must be {expected.dtype} of shape {expected_shape}, got {dtype} of shape {list(shape)}. The "
            "file was changed, or does not belong to its config.json; download or quantize the model again."
        )


def check_files(model: nn.Module, files: Iterable[str]) -> None:
    """Whether the tensors in safetensors files can be what the quantized layers of a model expect.

    Some hosts cast tensors to the dtype of the empty layer before a quantizer can see them: transformers 5.17 does.

    Raises:
        OSError: a damaged file.
        ValueError: see `check_tensor`.
    """
    expected = {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if isinstance(module, SVDQuantLayer)
        for leaf, parameter in module.named_parameters(recurse=False)
    }
    for file in files:
        tensors = meta_tensors(Path(file)) if file.endswith(".safetensors") else {}
        for name in expected.keys() & tensors.keys():
            check_tensor(name, expected[name], tuple(tensors[name].shape), tensors[name].dtype)


def check_layers(model: nn.Module) -> None:
    """Raises ValueError if the tensors of a layer do not fit together; called when all tensors are loaded."""
    for name, module in model.named_modules():
        if not isinstance(module, SVDQuantLayer):
            continue
        outputs, inputs = weight_shape(module)
        down, up = list(module.proj_down.shape), list(module.proj_up.shape)
        if down[1:] != [inputs] or up != [outputs, down[0]]:
            raise ValueError(
                f"`proj_down` and `proj_up` of {name!r} must be [rank, {inputs}] and [{outputs}, rank], got {down} "
                f"and {up}. The file was changed; download or quantize the model again."
            )
        if module.wscales.dim() == 1:
            precision = module.precision
        else:
            precision = "int4" if module.wtscale is None else "nvfp4"
        rotation, size = module.rotation, module.rotation_size
        expected = empty_weight(outputs, inputs, down[0], precision, module.proj_up.dtype, rotation=size)
        if rotation is not None and size is not None:
            if not rotation.is_meta and not torch.equal(rotation, rotation_tensor(size, rotation.device)):
                raise ValueError(
                    f"`rotation` of {name!r} must be {rotation_tensor(size).tolist()}, got {rotation.tolist()}. "
                    "Upgrade diffusers_sana."
                )
            if not can_rotate(inputs, size):
                raise ValueError(
                    f"{name!r} has {inputs} input features, which are no multiple of its rotation, {size}."
                )
        for item in fields(expected):
            if (wanted := getattr(expected, item.name)) is not None:
                part = getattr(module, item.name)
                check_tensor(f"{name}.{item.name}", wanted, tuple(part.shape), part.dtype)
        if module.bias is not None:
            check_tensor(
                f"{name}.bias", torch.empty(outputs, device="meta"), tuple(module.bias.shape), module.bias.dtype
            )


def missing_tensors(names: list[str]) -> ValueError:
    """The error for a checkpoint that lacks these tensors."""
    return ValueError(
        f"the checkpoint lacks {len(names)} tensors that its config.json calls for, among them {sorted(names)[:3]}. "
        "It is cut short or of another model; download it or quantize the model again."
    )
