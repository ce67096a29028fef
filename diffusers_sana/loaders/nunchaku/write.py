"""Writes Nunchaku's files: one `.safetensors` with the model's config in its header.

FLUX.1 and Sana have the names of the C++ engine, Qwen-Image, Z-Image and SDXL those of the Python modules. The engine
knows which layers are in 4 bits: a model that was quantized otherwise is refused.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import GROUP_SIZES
from diffusers_sana.loaders.nunchaku import flux, sana, v2
from diffusers_sana.loaders.nunchaku.layers import (
    LITE_NAMES,
    adaln_tensors,
    awq_layer,
    is_plain,
    svdq_tensors,
    without_shift,
)
from diffusers_sana.loaders.nunchaku.packing import RANK_TILE
from diffusers_sana.loaders.quantized.layer import UnpackedLayer
from diffusers_sana.loaders.quantized.model import QuantizedModel, Written, refuse_layers
from diffusers_sana.loaders.quantized.names import Scheme


NAME = "Nunchaku"
V1_NAMES = {ours: v1 for v1, ours in LITE_NAMES.items()}


@dataclass(frozen=True)
class _Layout:
    """What the engine expects of a model.

    Attributes:
        scheme: names in the file.
        quantized: names of the model's layers with 4-bit weights and activations.
        adaln: endings of the names of weight-only layers, and into how many parts their outputs fall.
        shifted: endings of names in the file of layers whose input is shifted in int4.
        is_v1: whether tensors have the names of the C++ engine.
        one_rank: whether all layers share one rank.
        has_tensor_scale: whether a layer may have one NVFP4 factor instead of one per row.
    """

    scheme: Scheme
    quantized: str
    adaln: Mapping[str, int] = field(default_factory=dict)
    shifted: tuple[str, ...] = ()
    is_v1: bool = False
    one_rank: bool = True
    has_tensor_scale: bool = False


LAYOUTS = {
    "FluxTransformer2DModel": _Layout(
        flux.SCHEME,
        r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)",
        {".norm1.linear": 6, ".norm1_context.linear": 6, ".norm.linear": 3},
        flux.SHIFTED,
        is_v1=True,
        one_rank=False,
        has_tensor_scale=True,
    ),
    "SanaTransformer2DModel": _Layout(
        {},
        r"transformer_blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|attn2\.(to_q|to_out\.0)|ff\.conv_(inverted|point))",
        is_v1=True,
        one_rank=False,
        has_tensor_scale=True,
    ),
    "QwenImageTransformer2DModel": _Layout(
        v2.SCHEMES["QwenImageTransformer2DModel"],
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
        r"|(img|txt)_mlp\.net\.(0\.proj|2))",
        dict.fromkeys(v2.ADALN, v2.ADALN_SPLITS),
        v2.SHIFTED,
    ),
    "ZImageTransformer2DModel": _Layout(
        v2.SCHEMES["ZImageTransformer2DModel"],
        r"layers\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",
    ),
    "UNet2DConditionModel": _Layout(
        v2.SCHEMES["UNet2DConditionModel"],
        r".*attentions\.\d+\.transformer_blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|attn2\.(to_q|to_out\.0)"
        r"|ff\.net\.(0\.proj|2))",
        is_v1=True,
    ),
}
REFINERS = r"(noise|context)_refiner\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"  # of Z-Image


def write(model: QuantizedModel, requantize: bool = False, **_: Any) -> Written:
    """The content of a file.

    4-bit codes and scales are unchanged. Layers that share their input are fused: their ranks add up if their down
    projections differ. Layers that Nunchaku keeps in 16 bits are written so.

    Args:
        model: the content.
        requantize: round once more: layers in another format, fused layers with different smoothing factors, and
            adaLN layers, which have 4 bits and no low-rank branch there.

    Raises:
        ValueError: a model that Nunchaku does not have, or a layer that the format cannot express, which is named.
    """
    model.check_dtype(torch.bfloat16, torch.float16, format_name=NAME)
    if model.class_name not in LAYOUTS:
        raise ValueError(f"Nunchaku has the models {sorted(LAYOUTS)}, got {model.class_name!r}.")
    layout, modules = LAYOUTS[model.class_name], model.modules
    expected = [name for name in modules if re.fullmatch(layout.quantized, name)]
    refiners = [name for name in modules if re.fullmatch(REFINERS, name)]
    has_refiners = any(name in model.layers for name in refiners)
    expected += refiners if has_refiners else []
    missing = [name for name in expected if name not in model.layers]
    if missing:
        raise ValueError(
            f"Nunchaku has 4-bit weights in {len(missing)} layers that are not quantized, such as {missing[0]!r}. "
            "Quantize them too."
        )
    precision = model.usual_precision(expected)
    scheme = layout.scheme if model.class_name != "SanaTransformer2DModel" else sana.SCHEME
    model.convert_precision(expected, precision, requantize, NAME, scheme)
    # The last layer's modulation has the same ending; those in blocks have a number in their names.
    adaln = [name for name in modules if name.endswith(tuple(layout.adaln)) and re.search(r"\.\d+\.", name)]
    if not requantize:
        branched = [name for name in adaln if name not in model.layers or not is_plain(model.layer(name))]
        refuse_layers(
            model,
            dict.fromkeys(branched, "it is 4 bits without branch and smoothing there; allow that with `requantize`"),
            NAME,
        )
    content = (
        sana.sana_content(model)
        if scheme is sana.SCHEME
        else model.in_file(layout.scheme, {*expected, *adaln}.__contains__)
    )
    layers: dict[str, UnpackedLayer] = {}
    tensors: dict[str, Tensor] = {}
    for place, item in content:
        if place in adaln:
            splits = next(size for end, size in layout.adaln.items() if place.endswith(end))
            if not isinstance(item, UnpackedLayer):
                item = awq_layer(item["weight"], item.get("bias"), model.dtype)
            tensors |= {f"{place}.{part}": value for part, value in adaln_tensors(item, model.dtype, splits).items()}
        elif not isinstance(item, UnpackedLayer):
            tensors |= {f"{place}.{leaf}".lstrip("."): value for leaf, value in item.items()}
        else:
            layers |= dict(_split_output(place, item))
    rank = max(RANK_TILE, *(item.rank for item in layers.values()))
    rank += -rank % RANK_TILE
    for place, item in layers.items():
        item = item.with_rank(rank) if layout.one_rank else item
        if item.precision == "int4" and place.endswith(layout.shifted):
            bias = torch.zeros(len(item.codes)) if item.bias is None else item.bias
            item = without_shift(replace(item, bias=bias), -1)
        tensors |= {f"{place}.{part}": value for part, value in _tensors(item, model.dtype, layout).items()}
    return Written(tensors, metadata=_metadata(model, precision, rank, bool(refiners) and not has_refiners))


def _split_output(place: str, item: UnpackedLayer) -> Iterator[tuple[str, UnpackedLayer]]:
    """The two layers for one of FLUX's single blocks, which add up: of attention, and of the MLP with the bias."""
    if not place.endswith(".proj_out"):
        yield place, item
        return
    block, (rows, columns) = place.removesuffix(".proj_out"), item.codes.shape
    yield f"{block}.out_proj", replace(item.columns(rows), bias=None).without_unused_ranks()
    yield f"{block}.mlp_fc2", item.columns(rows, columns).without_unused_ranks()


def _tensors(item: UnpackedLayer, dtype: torch.dtype, layout: _Layout) -> dict[str, Tensor]:
    parts = svdq_tensors(item, dtype)
    if layout.has_tensor_scale and item.row_scales is not None and bool((item.row_scales == item.row_scales[0]).all()):
        del parts["wcscales"]
        of_tensor = item.row_scales[:1]
        is_exact = torch.equal(of_tensor.to(dtype).float(), of_tensor)
        parts["wtscale"] = of_tensor.to(dtype) if is_exact else of_tensor
    return {V1_NAMES.get(part, part): value for part, value in parts.items()} if layout.is_v1 else parts


def _metadata(model: QuantizedModel, precision: str, rank: int, skips_refiners: bool) -> dict[str, str]:
    names = {"int4": "int4", "nvfp4": "fp4_e2m1_all"}
    scales = {"int4": None, "nvfp4": [None, "fp8_e4m3_nan"]}
    numbers = {
        "dtype": names[precision],
        "scale_dtype": scales[precision],
        "group_size": GROUP_SIZES[precision],
    }
    quantization: dict[str, Any] = {"method": "svdquant", "weight": numbers, "activation": numbers, "rank": rank}
    if skips_refiners:
        quantization["skip_refiners"] = True
    return {
        "config": json.dumps(model.config),
        "model_class": f"Nunchaku{model.class_name}".replace("FluxTransformer2DModel", "FluxTransformer2dModel"),
        "quantization_config": json.dumps(quantization),
        "comfy_config": "{}",
    }
