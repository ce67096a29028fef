"""What happens to a model while a checkpoint is loaded into it, alike in diffusers and transformers.

A 16-bit checkpoint: each weight is quantized when it arrives (`quantize_weight`). A quantized one: its layers wait as
placeholders (`insert_placeholders`), and what arrives is checked (`check_tensor`, `check_layers`).
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer, placeholder
from diffusers_sana.quantizers.svdquant.quantize_model import options_for, replace_layer
from diffusers_sana.quantizers.svdquant.targets import find_targets, weight_shape


FULL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_request(config: SVDQuantConfig, pre_quantized: bool, device_map: Any) -> None:
    """Refuses what quantizing during loading cannot do.

    Raises:
        ValueError: `gptq`, or weights that are to stay on disk, for a checkpoint that is not quantized yet.
    """
    if pre_quantized:
        return
    if config.gptq:
        raise ValueError(
            "`gptq` must be False in `from_pretrained`, which has no calibration data, got True. Load the model first "
            "and quantize it with prompts."
        )
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise ValueError(
            "`device_map` must not put layers on disk while they are quantized. Quantize once without it, save the "
            "model, and load that."
        )


def check_layout(config: SVDQuantConfig) -> None:
    """Refuses a quantized folder of another runtime.

    Raises:
        ValueError: a config that is none of ours.
    """
    if config.layout is None:
        raise ValueError(
            "the model was quantized by another runtime than diffusers_sana, such as vLLM-Omni, which also calls its "
            "layout `svdquant`: the `quantization_config` has neither `layout` nor `modules`. Load it there, or "
            "quantize the original model with `diffusers_sana.quantize`."
        )


def check_no_adapters(names: Iterable[str]) -> None:
    """Refuses to save a model with adapters beside its layers, whose file could not be loaded again.

    Args:
        names: of the state dict.

    Raises:
        ValueError: an adapter.
    """
    if any(".base_layer." in name for name in names):
        raise ValueError(
            "the model cannot be saved while adapters are beside its layers: nothing could load the folder. Call "
            "`unload_lora_weights` before; to keep their effect, call `fuse_lora` before that. Adapters themselves "
            "are saved by `save_lora_weights`."
        )


def quantize_weight(model: nn.Module, name: str, weight: Tensor, mode: str, config: SVDQuantConfig) -> SVDQuantLayer:
    """Quantizes the layer of that name from its weight, on the weight's device, and puts the result in its place.

    The bias may have arrived or be still to come: it stays a parameter of the same name.

    Raises:
        ValueError: NaN or infinity in the weight.
    """
    original = cast(nn.Linear | nn.Conv2d, model.get_submodule(name))
    matrix = weight.detach().to(original.weight.dtype).flatten(1)
    if not matrix.isfinite().all():
        raise ValueError(
            f"the weight of {name!r} must be finite, got NaN or infinity. Load the model in bf16 or fp32."
        )
    with torch.no_grad():
        (quantized,), _ = decompose([matrix], options_for(config, mode))
    return replace_layer(model, name, quantized, mode, config)


def insert_placeholders(model: nn.Module, config: SVDQuantConfig) -> None:
    """Replaces the layers that a quantized checkpoint lists by quantized ones on the meta device.

    Raises:
        ValueError: see `find_targets`; the checkpoint is then of another model.
    """
    for name, mode in find_targets(model, config).items():
        original = cast(nn.Linear | nn.Conv2d, model.get_submodule(name))
        options = options_for(config, mode)
        weight = placeholder(*weight_shape(original), options.rank, options.precision, original.weight.dtype)
        replace_layer(model, name, weight, mode, config)


def layer_of(model: nn.Module, tensor_name: str) -> tuple[SVDQuantLayer | None, str]:
    """The quantized layer that a tensor of the state dict belongs to, if any, and the tensor's name in it."""
    name, _, leaf = tensor_name.rpartition(".")
    module = model.get_submodule(name)
    return (module if isinstance(module, SVDQuantLayer) else None), leaf


def check_tensor(name: str, expected: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whether a tensor of a checkpoint can be what its layer expects. The rank is free: fused adapters raise it.

    Raises:
        ValueError: another shape, or a dtype of another kind.
    """
    leaf = name.rpartition(".")[2]
    wanted: list[int | str] = list(expected.shape)
    if leaf in ("proj_down", "proj_up"):
        wanted[0 if leaf == "proj_down" else 1] = "rank"
    fits = len(wanted) == len(shape) and all(w in ("rank", s) for w, s in zip(wanted, shape, strict=True))
    same_kind = dtype == expected.dtype or (dtype in FULL_DTYPES and expected.dtype in FULL_DTYPES)
    if not fits or not same_kind:
        raise ValueError(
            f"{name!r} must be {expected.dtype} of shape {wanted}, got {dtype} of shape {list(shape)}. The file was "
            "changed, or does not belong to its config.json; download or quantize the model again."
        )


def check_layers(model: nn.Module) -> None:
    """Whether the low-rank branches fit their layers; to be called when everything has arrived.

    Raises:
        ValueError: where one does not.
    """
    for name, module in model.named_modules():
        if not isinstance(module, SVDQuantLayer):
            continue
        down, up = list(module.proj_down.shape), list(module.proj_up.shape)
        if down[1:] != list(module.smooth_factor.shape) or up != [module.qweight.shape[0], down[0]]:
            raise ValueError(
                f"`proj_down` and `proj_up` of {name!r} must be [rank, {module.smooth_factor.shape[0]}] and "
                f"[{module.qweight.shape[0]}, rank], got {down} and {up}. The file was changed; download or quantize "
                "the model again."
            )


def missing_tensors(names: list[str]) -> ValueError:
    """The error of a checkpoint without these tensors."""
    return ValueError(
        f"the checkpoint lacks {len(names)} tensors that its config.json calls for, among them {sorted(names)[:3]}. "
        "It is cut short or of another model; download it or quantize the model again."
    )
