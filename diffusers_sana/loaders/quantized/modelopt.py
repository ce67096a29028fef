"""NVIDIA ModelOpt's `NVFP4_SVD`: a diffusers folder that TensorRT-LLM loads, with static scales of activations.

Per layer `weight` uint8 `[N, K/2]`, `weight_scale` e4m3 `[N, K/16]`, `weight_scale_2` and `input_scale` fp32 scalars,
`pre_quant_scale` `[K]`, which multiplies the input, and `svdquant_lora_a` `[r, K]`, `svdquant_lora_b` `[N, r]`, which
see the scaled input. Source: modelopt.torch.export 0.47.0.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ConfigMixin
from torch import Tensor

from diffusers_sana.loaders.quantized.assemble import Conversion, Reading, convert_by_names
from diffusers_sana.loaders.quantized.checkpoint import Checkpoint
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer, one_factor
from diffusers_sana.loaders.quantized.model import QuantizedModel, Written, refuse_layers
from diffusers_sana.loaders.quantized.rows import pairs, unpairs
from diffusers_sana.quantizers.svdquant.integrations.checkpoint import recorded_config
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLinear, quantized_layers
from diffusers_sana.quantizers.svdquant.targets import sibling_groups


NAME = "ModelOpt's NVFP4_SVD"
GROUP = 16
LARGEST = 6.0 * 448.0  # of e2m1 times an e4m3 scale
RANK_MULTIPLE = 32  # of FlashInfer's fused kernel


def reading(checkpoint: Checkpoint, class_name: str, base: Mapping[str, Tensor]) -> Reading:
    """How to read a folder. Static scales of inputs stay with the layers, for writing."""
    algorithm = checkpoint.quantization.get("quant_algo", "NVFP4_SVD")
    if algorithm != "NVFP4_SVD":
        raise ValueError(f"`quant_algo` of {checkpoint.path} must be 'NVFP4_SVD', got {algorithm!r}.")

    def convert(source: Source, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Conversion:
        def read(name: str, rows: int, columns: int) -> UnpackedLayer | None:
            return _layer(source, name, rows, columns) if f"{name}.svdquant_lora_a" in source else None

        return convert_by_names(source, shapes, dtype, {}, read)

    return Reading(convert, checkpoint.tensors)


def _layer(source: Source, name: str, rows: int, columns: int) -> UnpackedLayer:
    rank = source.take(f"{name}.svdquant_lora_a").shape[0]
    factor = source.get(f"{name}.pre_quant_scale", (columns,))
    factor = torch.ones(columns) if factor is None else factor.float()
    return UnpackedLayer(
        unpairs(source.take(f"{name}.weight", (rows, columns // 2))),
        source.take(f"{name}.weight_scale", (rows, columns // GROUP)),
        source.numbers(f"{name}.weight_scale_2", rows),
        1 / factor,
        source.take(f"{name}.svdquant_lora_a", (rank, columns)).float() * factor,
        source.take(f"{name}.svdquant_lora_b", (rows, rank)),
        source.get(f"{name}.bias", (rows,)),
        input_scale=source.number(f"{name}.input_scale"),
    )


@contextmanager
def measure_input_scales(model: Any) -> Iterator[None]:
    """Measures the static input scales of quantized layers: the largest |input / smooth_factor| that they meet.

    They stay with the layers, are saved in the model's config, and let `export_quantized(model, folder, "modelopt")`
    write what TensorRT-LLM needs. Our own layers do not use them.

        with measure_input_scales(pipe.transformer):
            pipe(["a cat", "a street at night"])

    Args:
        model: with layers quantized by SVDQuant, which are called within the block.

    Raises:
        ValueError: a model without quantized layers.
    """
    layers = [layer for layer in quantized_layers(model) if isinstance(layer, SVDQuantLinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layers quantized by SVDQuant. Quantize it first.")

    @torch.no_grad()
    def measure(layer: Any, args: tuple[Any, ...]) -> None:
        largest = (args[0].float() / layer.smooth_factor.float()).abs().amax().item() / LARGEST
        layer.input_scale = max(largest, layer.input_scale or 0.0)

    for layer in layers:
        layer.input_scale = None
    handles = [layer.register_forward_pre_hook(measure) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    config = getattr(model.config, "quantization_config", None) if isinstance(model, ConfigMixin) else None
    if config is not None:
        model.register_to_config(quantization_config=recorded_config(config, model))


def write(model: QuantizedModel, requantize: bool = False, **_: Any) -> Written:
    """The content of a folder.

    Codes are unchanged, except that -0 becomes 0; scales of groups move by the powers of two between row factors and
    the one factor of the tensor. Layers with 16-bit activations and convolutions are written in 16 bits.

    Raises:
        ValueError: the format cannot express a layer, which is named, such as one without a measured `input_scale`.
    """
    quantized = [name for name in model.layers if not model.is_weight_only(name) and not model.is_convolution(name)]
    model.convert_precision(quantized, "nvfp4", False, NAME)  # the scales of inputs are those of these layers
    reasons = {name: reason for name in quantized if (reason := _refusal(model.layer(name)))}
    refuse_layers(model, reasons, NAME)
    rank = model.common_rank(quantized, RANK_MULTIPLE)
    factors: dict[str, Tensor] = {}  # layers that share their input have one
    for group in sibling_groups(dict.fromkeys(quantized, "w4a4")):
        largest = torch.stack([model.layer(name).row_scales.max() for name in group]).max()  # type: ignore[union-attr]
        factors |= dict.fromkeys(group, largest)
    tensors: dict[str, Tensor] = {}
    skipped = []
    for name, content in model.in_file({}, set(quantized).__contains__):
        if isinstance(content, UnpackedLayer):
            tensors |= {
                f"{name}.{part}": tensor for part, tensor in _tensors(content, name, rank, factors[name]).items()
            }
            continue
        tensors |= {f"{name}.{leaf}".lstrip("."): tensor for leaf, tensor in content.items()}
        if "weight" in content and content["weight"].dim() == 2:
            skipped.append(name)
    format_of_numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP}
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4_SVD",
        "config_groups": {
            "group_0": {
                "weights": format_of_numbers,
                "input_activations": format_of_numbers,
                "has_zero_point": False,
                "pre_quant_scale": True,
                "lora_rank": rank,
                "targets": ["Linear"],
            }
        },
        "ignore": skipped,
        "producer": {"name": "diffusers_sana"},
    }
    return Written(tensors, {**model.config, "quantization_config": quantization})


def _refusal(item: UnpackedLayer) -> str | None:
    """Why a layer cannot be written."""
    if item.codes.shape[1] % GROUP:
        return f"it needs a multiple of {GROUP} input features, got {item.codes.shape[1]}"
    if item.input_scale is None:
        return (
            "it needs a static scale of its input. Run the pipeline on a few prompts within "
            "`diffusers_sana.measure_input_scales(model)`, or pass `prompts`"
        )
    return None


def _tensors(item: UnpackedLayer, name: str, rank: int, factor: Tensor) -> dict[str, Tensor]:
    item = item.with_rank(rank)
    codes, scales, factor = one_factor(item, name, factor)
    smooth = item.smooth.float()
    parts = {
        "weight": pairs(codes),
        "weight_scale": scales,
        "weight_scale_2": factor,
        "pre_quant_scale": 1 / smooth,
        "svdquant_lora_a": (item.down.float() * smooth).to(item.down.dtype),
        "svdquant_lora_b": item.up,
    }
    parts["input_scale"] = torch.tensor(item.input_scale)
    return parts if item.bias is None else parts | {"bias": item.bias}
