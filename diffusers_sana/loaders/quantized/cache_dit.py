"""cache-dit's `svdq_*` files: one safetensors file with the quantized layers only; all else is the base model's.

Tensors are those of Nunchaku-Lite, padded to 128, and `smooth_factor_orig`. NVFP4 layers have `wcscales`, no
`wtscale`. Source: cache_dit/quantization/svdquant/ptq.py 1.5.3, format version 2.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.loaders.nunchaku.layers import LITE_NAMES, read_svdq, svdq_tensors
from diffusers_sana.loaders.nunchaku.packing import RANK_TILE
from diffusers_sana.loaders.quantized.assemble import Conversion, Reading, convert_by_names
from diffusers_sana.loaders.quantized.checkpoint import METADATA_OF_CACHE_DIT, Checkpoint
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer
from diffusers_sana.loaders.quantized.model import QuantizedModel, Written, refuse_layers


logger = logging.getLogger(__name__)

NAME = "cache-dit"
VERSION = 2


def reading(checkpoint: Checkpoint, class_name: str, base: Mapping[str, Tensor]) -> Reading:
    """How to read a file.

    Raises:
        ValueError: no base model, another version, or tensors that do not fit the header.
    """
    header = json.loads(checkpoint.metadata[METADATA_OF_CACHE_DIT])
    if header.get("version") != VERSION:
        raise ValueError(
            f"`version` of the cache-dit file {checkpoint.path} must be {VERSION}, got {header.get('version')!r}."
        )
    if not base:
        raise ValueError(
            f"`base` must be the 16-bit model: the cache-dit file {checkpoint.path} has quantized layers only."
        )
    missing = [name for name in header["quantized_layer_names"] if f"{name}.qweight" not in checkpoint.tensors]
    if missing:
        raise ValueError(
            f"{checkpoint.path} must have '{missing[0]}.qweight', which its header lists. Download it again."
        )

    def convert(source: Source, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Conversion:
        def read(name: str, rows: int, columns: int) -> UnpackedLayer | None:
            return read_svdq(source, name, rows, columns, LITE_NAMES) if f"{name}.qweight" in source else None

        return convert_by_names(source, shapes, dtype, {}, read)

    return Reading(convert, checkpoint.tensors, (".smooth_factor_orig",))


def write(model: QuantizedModel, requantize: bool = False, **_: Any) -> Written:
    """The content of a file.

    4-bit codes and scales are unchanged. Layers with 16-bit activations, convolutions and everything that is not
    quantized are left to the base model.

    Raises:
        ValueError: the format cannot express a layer, which is named.
    """
    model.check_dtype(torch.bfloat16, torch.float16, format_name=NAME)
    quantized = [name for name in model.layers if not model.is_weight_only(name) and not model.is_convolution(name)]
    if left := [name for name in model.layers if name not in set(quantized)]:
        logger.warning(
            f"{len(left)} quantized layers, such as {left[0]!r}, have 16-bit activations or are convolutions; "
            f"{NAME} will use the base model's 16-bit weights for them."
        )
    precisions = {model.layer(name).precision for name in quantized}
    precision = "nvfp4" if "nvfp4" in precisions else "int4"
    model.convert_precision(quantized, precision, requantize, NAME)
    multiple = 64 if precision == "int4" else 16
    odd = {
        name: f"it needs a multiple of {multiple} input features, got {model.layer(name).codes.shape[1]}"
        for name in quantized
        if model.layer(name).codes.shape[1] % multiple
    }
    refuse_layers(model, odd, NAME)
    rank = model.common_rank(quantized, RANK_TILE) if any(model.layer(name).rank for name in quantized) else 0
    tensors: dict[str, Tensor] = {}
    for name in quantized:
        parts = svdq_tensors(model.layer(name).with_rank(rank), model.dtype)
        parts["smooth_factor_orig"] = parts["smooth_factor"].clone()
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    quant_type = f"svdq_{precision}_r{rank}"
    header = {
        "format": METADATA_OF_CACHE_DIT,
        "version": VERSION,
        "quant_type": quant_type,
        "rank": rank,
        "precision": precision,
        "quantized_layer_names": quantized,
        "svdq_kwargs": {},
    }
    return Written(tensors, metadata={METADATA_OF_CACHE_DIT: json.dumps(header)})
