"""ComfyUI's formats of rotated and 8-bit weights, from and to 16-bit matrices; int8 also from and to our layers.

    convrot_w4a4      4-bit codes of the rotated weight, one scale a row
    int8_tensorwise   8-bit codes, rotated or not, one scale a row or a tensor: our int8 layer
    asym_w4a8_int8    4- or 6-bit codes of levels, scales of groups of 16 and of rows, rotated
    float8_*          8-bit floating-point numbers, one scale a tensor

A rotation multiplies each block of `convrot_groupsize` input features of the weight by a regular Hadamard matrix,
which is symmetric and its own inverse; the runtime rotates the input. It is the matrix of `kernels/rotation.py` with
its columns in reverse order, so codes in int8, where no groups share a scale, only change their order. Source:
comfy-kitchen 0.2.40.

Legend: N output features, K input features.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import decode_int4, nonzero
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer
from diffusers_sana.loaders.quantized.rows import pairs, unpairs


INT8 = "int8_tensorwise"
GROUP = 256  # features that are rotated together
LEVELS_GROUP = 16
LEVELS = {4: 7, 8: 127}  # the largest code


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


def _unrotated(weight: Tensor, conf: Mapping[str, Any]) -> Tensor:
    return rotate(weight, conf.get("convrot_groupsize", GROUP)) if conf.get("convrot", True) else weight


def read_int8(source: Source, name: str, rows: int, columns: int, conf: Mapping[str, Any]) -> UnpackedLayer:
    """The layer as one of ours, with the same codes and scales."""
    codes = source.take(f"{name}.weight", (rows, columns))
    if codes.dtype != torch.int8:
        raise ValueError(f"'{name}.weight' of {source.origin} must be int8, got {codes.dtype}.")
    size = conf.get("convrot_groupsize", GROUP) if conf.get("convrot", False) else None
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
        source.take(f"{name}.weight_scale").float().flatten().expand(rows),
        None,
        torch.ones(columns),
        torch.zeros(0, columns),
        torch.zeros(rows, 0),
        source.get(f"{name}.bias", (rows,)),
        weight_only=bool(conf.get("full_precision_matrix_mult", False)),
        rotation=size,
    )


def fits_int8(layer: UnpackedLayer) -> bool:
    """Whether `write_int8` takes a layer: int8, without smoothing factors and branch, in whole rotated groups."""
    return (
        layer.precision == "int8"
        and not layer.has_branch
        and bool((layer.smooth == 1).all())
        and (layer.rotation is None or layer.codes.shape[1] % layer.rotation == 0)
    )


def write_int8(layer: UnpackedLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The format and the tensors of a layer that `fits_int8`; codes and scales do not change."""
    conf: dict[str, Any] = {"format": INT8, "per_row": True, "convrot": layer.rotation is not None}
    codes = layer.codes
    if layer.rotation is not None:
        conf["convrot_groupsize"], codes = layer.rotation, _reversed_groups(codes, layer.rotation)
    if layer.weight_only:
        conf["full_precision_matrix_mult"] = True
    return conf, {"weight": codes, "weight_scale": layer.scales[:, None]}


def _reversed_groups(codes: Tensor, size: int) -> Tensor:
    return codes.unflatten(-1, (-1, size)).flip(-1).flatten(-2)


def _w4a4(source: Source, name: str, rows: int, columns: int, conf: Mapping[str, Any]) -> Tensor:
    codes = decode_int4(unpairs(source.take(f"{name}.weight", (rows, columns // 2))))
    return _unrotated(codes.float() * source.take(f"{name}.weight_scale").float().reshape(rows, 1), conf)


def _w4a8(source: Source, name: str, rows: int, columns: int, conf: Mapping[str, Any]) -> Tensor:
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
    scaled = (levels.unflatten(1, (-1, LEVELS_GROUP)) * relative[..., None]).flatten(1).round().clamp(-127, 127)
    return _unrotated(scaled * source.take(f"{name}.weight_s_channel").float().reshape(rows, 1), conf)


def _float8(source: Source, name: str, rows: int, columns: int, conf: Mapping[str, Any]) -> Tensor:
    weight, scale = source.take(f"{name}.weight", (rows, columns)), source.get(f"{name}.weight_scale")
    return weight.float() * (1.0 if scale is None else scale.float())


READERS = {
    "convrot_w4a4": _w4a4,
    "asym_w4a8_int8": _w4a8,
    "float8_e4m3fn": _float8,
    "float8_e5m2": _float8,
}


def encode(weight: Tensor, num_bits: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The format and the tensors of a weight `[N, K]`, rotated if K allows it, with one scale a row."""
    size = rotation_size(weight.shape[1])
    rotated = weight.float() if size is None else rotate(weight.float(), size)
    scale = rotated.abs().amax(1) / LEVELS[num_bits]
    codes = (rotated / nonzero(scale)[:, None]).round().clamp(-LEVELS[num_bits], LEVELS[num_bits]).to(torch.int8)
    if num_bits == 4:
        parts = {"weight": pairs(codes.bitwise_and(15).view(torch.uint8)).view(torch.int8), "weight_scale": scale}
        return {
            "format": "convrot_w4a4",
            "convrot_groupsize": size,
            "linear_dtype": "int4",
            "quant_group_size": 64,
        }, parts
    conf = {"format": INT8, "per_row": True}
    conf |= {"convrot": False} if size is None else {"convrot": True, "convrot_groupsize": size}
    return conf, {"weight": codes, "weight_scale": scale[:, None]}
