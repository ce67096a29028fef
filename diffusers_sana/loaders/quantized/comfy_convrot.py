"""ComfyUI's formats of rotated and 8-bit weights with one scale a row, from and to our layers.

    convrot_w4a4      4-bit codes of the rotated weight: our int4 layer, whose groups of a row share a scale
    int8_tensorwise   8-bit codes, rotated or not: our int8 layer; some writers have one scale a tensor
    float8_e4m3fn     8-bit floating-point numbers, one scale a tensor or a row: our float8 layer
    asym_w4a8_int8    4- or 6-bit codes of levels with scales of groups of 16, which give 8-bit codes: our int8 layer

A rotation multiplies each block of `convrot_groupsize` input features of the weight by a regular Hadamard matrix,
which is symmetric and its own inverse; the runtime rotates the input. It is the matrix of `kernels/rotation.py` with
its columns in reverse order, so codes of rows with one scale only change their order. Source: comfy-kitchen 0.2.40.

Legend: N output features, K input features.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import GROUP_SIZES, MAX_CODES, encode_int4, encode_int8, nonzero
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer
from diffusers_sana.loaders.quantized.rows import pairs, unpairs


INT8, FLOAT8 = "int8_tensorwise", "float8_e4m3fn"
NAN = 127  # of e4m3, but for the sign
GROUP = 256  # features that are rotated together
LEVELS_GROUP = 16
PRECISIONS = {4: "int4", 8: "int8"}  # by bits


@cache
def hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix of a power of 4, scaled to be orthogonal."""
    block = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, block)
    if len(matrix) != size:
        raise ValueError(f"`convrot_groupsize` must be a power of 4, got {size}.")
    return matrix / size**0.5


def rotate(weight: Tensor, size: int) -> Tensor:
    """Rotates blocks of features, `[N, K]`; a second time is the inverse."""
    return (weight.unflatten(-1, (-1, size)) @ hadamard(size)).flatten(-2)


def rotation_size(features: int) -> int | None:
    """The largest rotation, up to `GROUP`, that divides K."""
    return next((size for size in (GROUP, 64, 16, 4) if features % size == 0), None)


def read_int8(source: Source, name: str, rows: int, columns: int, conf: Mapping[str, Any]) -> UnpackedLayer:
    """The layer as one of ours, with the same codes and scales."""
    codes = source.take(f"{name}.weight", (rows, columns))
    if codes.dtype != torch.int8:
        raise ValueError(f"'{name}.weight' of {source.origin} must be int8, got {codes.dtype}.")
    return _layer(source, name, codes, source.numbers(f"{name}.weight_scale", rows), {"convrot": False, **conf})


def read_float8(source: Source, name: str, rows: int, columns: int, conf: Mapping[str, Any]) -> UnpackedLayer:
    """The layer as one of ours, with the same bytes and scales; without a scale it is 1."""
    weight = source.take(f"{name}.weight", (rows, columns))
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"'{name}.weight' of {source.origin} must be {torch.float8_e4m3fn}, got {weight.dtype}.")
    codes = weight.view(torch.uint8)
    if bool((codes & NAN == NAN).any()):
        raise ValueError(f"'{name}.weight' of {source.origin} must be finite, but has NaN. Download it again.")
    layer = _layer(source, name, codes, float8_scales(source, name, rows), {**conf, "convrot": False})
    return replace(layer, input_scale=source.number(f"{name}.input_scale"))


def float8_scales(source: Source, name: str, rows: int) -> Tensor:
    """One scale a row, fp32 `[N]`; 1 if the file has none."""
    key = f"{name}.weight_scale"
    return source.numbers(key, rows) if key in source else torch.ones(rows)


def read_w4a4(source: Source, name: str, rows: int, columns: int, conf: Mapping[str, Any]) -> UnpackedLayer:
    """Our groups of a row all have its scale."""
    codes = unpairs(source.take(f"{name}.weight", (rows, columns // 2)))
    groups = -(-columns // GROUP_SIZES["int4"])
    scales = source.numbers(f"{name}.weight_scale", rows)[:, None].expand(rows, groups)
    return _layer(source, name, codes, scales, conf)


def read_w4a8(source: Source, name: str, rows: int, columns: int, conf: Mapping[str, Any]) -> UnpackedLayer:
    """The runtime turns codes into int8 before the product; our layer has these, in twice the bits of the file."""
    packed = source.take(f"{name}.weight")
    has_six_bits = packed.shape[1] * 4 == columns * 3
    source.take(f"{name}.weight", (rows, columns * 3 // 4 if has_six_bits else columns // 2))
    if source.get(f"{name}.weight_correction") is not None:
        raise ValueError(f"{name!r} of {source.origin} has a `weight_correction`, which is not supported.")
    codes = unpairs(packed[:, : columns // 2].contiguous()).to(torch.int16)
    if has_six_bits:
        high = packed[:, columns // 2 :].contiguous().view(torch.uint8)
        codes |= (torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1) << 4).to(torch.int16)
    codebook = source.get(f"{name}.weight_codebook")
    zero = 32 if has_six_bits else 8
    levels = (codes - zero).float() if codebook is None else codebook.float()[codes.long()]
    relative = source.take(f"{name}.weight_s_rel", (rows, columns // LEVELS_GROUP)).float()
    scaled = encode_int8((levels.unflatten(1, (-1, LEVELS_GROUP)) * relative[..., None]).flatten(1))
    return _layer(source, name, scaled, source.numbers(f"{name}.weight_s_channel", rows), conf)


def _layer(source: Source, name: str, codes: Tensor, scales: Tensor, conf: Mapping[str, Any]) -> UnpackedLayer:
    """A layer of codes and scales without smoothing factors and a branch; rotated, unless `conf` says it is not."""
    rows, columns = codes.shape
    size = conf.get("convrot_groupsize", GROUP) if conf.get("convrot", True) else None
    if size is not None:
        hadamard(size)  # raises for other sizes than powers of 4
        if columns % size:
            raise ValueError(
                f"`convrot_groupsize` of {name!r} in {source.origin} must divide its {columns} input features, got "
                f"{size}."
            )
        codes = _reversed_groups(codes, size)
    return UnpackedLayer(
        codes,
        scales,
        None,
        torch.ones(columns),
        torch.zeros(0, columns),
        torch.zeros(rows, 0),
        source.get(f"{name}.bias", (rows,)),
        weight_only=bool(conf.get("full_precision_matrix_mult", False)),
        rotation=size,
    )


def fits(layer: UnpackedLayer) -> bool:
    """Whether `write` takes a layer: one scale a row, without smoothing factors and branch, in whole rotated groups.

    int8 layers need not be rotated, int4 layers must be, float8 layers must not be.
    """
    if layer.rotation is None:
        has_format = layer.precision in ("int8", "float8")
    else:
        has_format = layer.precision in ("int4", "int8") and layer.codes.shape[1] % layer.rotation == 0
    return (
        has_format
        and not layer.has_branch
        and bool((layer.smooth == 1).all())
        and (layer.scales.dim() == 1 or bool((layer.scales == layer.scales[:, :1]).all()))
    )


def write(layer: UnpackedLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The format and the tensors of a layer that `fits`; codes and scales do not change."""
    codes, conf = layer.codes, _conf(layer.precision, layer.rotation)
    if layer.rotation is not None:
        codes = _reversed_groups(codes, layer.rotation)
    if layer.weight_only:
        conf["full_precision_matrix_mult"] = True
    if layer.precision == "float8":
        return conf, _float8_parts(layer)
    return conf, _parts(codes, layer.scales if layer.precision == "int8" else layer.scales[:, 0].float())


def _float8_parts(layer: UnpackedLayer) -> dict[str, Tensor]:
    """With one scale a tensor, as ComfyUI's own, where all rows have the same."""
    is_same = bool((layer.scales == layer.scales[0]).all())
    scale = layer.scales[0] if is_same else layer.scales[:, None]
    parts = {"weight": layer.codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    return parts if layer.input_scale is None else parts | {"input_scale": torch.tensor(layer.input_scale)}


def _conf(precision: str, size: int | None) -> dict[str, Any]:
    if precision == "int4":
        return {"format": "convrot_w4a4", "convrot_groupsize": size, "linear_dtype": "int4", "quant_group_size": 64}
    if precision == "float8":
        return {"format": FLOAT8}
    conf = {"format": INT8, "per_row": True, "convrot": size is not None}
    return conf if size is None else conf | {"convrot_groupsize": size}


def _parts(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The tensors of int8 codes or nibbles and of scales `[N]`."""
    if codes.dtype == torch.int8:
        return {"weight": codes, "weight_scale": scale[:, None]}
    return {"weight": pairs(codes).view(torch.int8), "weight_scale": scale}


def _reversed_groups(codes: Tensor, size: int) -> Tensor:
    return codes.unflatten(-1, (-1, size)).flip(-1).flatten(-2)


def encode(weight: Tensor, num_bits: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The format and the tensors of a weight `[N, K]`, rotated if K allows it, with one scale a row."""
    precision, size = PRECISIONS[num_bits], rotation_size(weight.shape[1])
    rotated = weight.float() if size is None else rotate(weight.float(), size)
    scale = rotated.abs().amax(1) / MAX_CODES[precision]
    scaled = rotated / nonzero(scale)[:, None]
    return _conf(precision, size), _parts(encode_int8(scaled) if num_bits == 8 else encode_int4(scaled), scale)
