"""The 4-bit number formats of SVDQuant: codes, scales, packing (arXiv 2411.05007; NVFP4: OCP e2m1 with e4m3 scales).

    int4    codes -7..7 (two's complement), one scale per 64 neighbours along K
    nvfp4   codes of {0, .5, 1, 1.5, 2, 3, 4, 6} and a sign bit, one e4m3 scale per 16 neighbours, one scale per row

Two 4-bit values share a byte, planar within their group of G: byte j holds element j in its low half and element j +
G/2 in its high half, so unpacking gives two contiguous halves without interleaving. K is padded with zero codes to a
multiple of 64.

Legend: N output features, K input features, Kp = K padded, G group size, R rows of anything.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


GROUP_SIZES = {"int4": 64, "nvfp4": 16}
MAX_CODES = {"int4": 7.0, "nvfp4": 6.0}  # the largest magnitude of a code
K_MULTIPLE = 64
E4M3_MAX = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def precision_of(wscales: Tensor) -> str:
    """The format of a layer, known by its scales: NVFP4 has e4m3 scales."""
    return "nvfp4" if wscales.dtype == torch.float8_e4m3fn else "int4"


def padded(features: int) -> int:
    """K rounded up to a multiple of `K_MULTIPLE`."""
    return -(-features // K_MULTIPLE) * K_MULTIPLE


def pad_features(x: Tensor) -> Tensor:
    """Zeros after the last axis, up to `padded`."""
    return F.pad(x, (0, padded(x.shape[-1]) - x.shape[-1]))


def pack_nibbles(codes: Tensor, group_size: int) -> Tensor:
    """Nibbles `[R, K]`, 0..15 in uint8, to bytes `[R, K/2]`."""
    low, high = codes.unflatten(-1, (-1, 2, group_size // 2)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def unpack_nibbles(packed: Tensor, group_size: int) -> Tensor:
    """Bytes `[R, K/2]` to nibbles `[R, K]`, 0..15 in uint8."""
    packed = packed.unflatten(-1, (-1, group_size // 2))
    return torch.stack([packed & 15, packed >> 4], dim=-2).flatten(-3)


def encode_int4(scaled: Tensor) -> Tensor:
    """Numbers in units of their scale to nibbles: round half to even, clamp to -7..7."""
    return scaled.round().clamp(-7, 7).to(torch.int8).bitwise_and(15).view(torch.uint8)


def decode_int4(nibbles: Tensor) -> Tensor:
    """Nibbles to integers in int8."""
    return ((nibbles ^ 8).view(torch.int8)) - 8


def encode_e2m1(scaled: Tensor) -> Tensor:
    """Numbers in units of their scale to nibbles: the nearest, ties to the even code; beyond 6 they saturate."""
    magnitude = scaled.abs().float().clamp_(max=E2M1[-1])
    # Neighbours are 1/2 apart up to 2, 1 up to 4, and 2 above; `round` takes ties to the even index there too.
    above = torch.where(magnitude < 4, magnitude.round() + 2, (magnitude / 2).round() + 4)
    index = torch.where(magnitude < 2, (magnitude * 2).round(), above).to(torch.uint8)
    return index | (scaled.signbit().to(torch.uint8) << 3)


def decode_e2m1(nibbles: Tensor) -> Tensor:
    """Nibbles to numbers in fp32."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=nibbles.device)
    return values[nibbles.long()]


def nonzero(scale: Tensor) -> Tensor:
    """A scale to divide by: 1 in place of the scale 0 of groups of zeros, whose codes stay 0."""
    return torch.where(scale == 0, 1.0, scale)


def weight_scales(weight: Tensor, precision: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales by which the largest magnitude of each group is representable.

    Args:
        weight: `[N, Kp]`, fp32.
        precision: "int4" or "nvfp4".
        dtype: in which scales are stored.

    Returns:
        `wscales` `[N, Kp/G]`, in `dtype` or e4m3, and for nvfp4 `wtscale` `[N]`: powers of two, which every
        dtype represents exactly, by which the largest group scale of the row is at the top of e4m3.
    """
    amax = weight.unflatten(-1, (-1, GROUP_SIZES[precision])).abs().amax(-1)
    scales = amax / MAX_CODES[precision]
    if precision == "int4":
        return scales.to(dtype), None
    largest = scales.amax(-1)
    wtscale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest / E4M3_MAX).exponent)
    return (scales / wtscale[:, None]).to(torch.float8_e4m3fn), wtscale.to(dtype)


def group_scales(wscales: Tensor, wtscale: Tensor | None) -> Tensor:
    """All scales of a weight multiplied, fp32 `[N, Kp/G]` (fp64 where they are)."""
    scales = wscales if wscales.dtype == torch.float64 else wscales.float()
    return scales if wtscale is None else scales * wtscale.to(scales.dtype)[:, None]


def encode_weight(weight: Tensor, wscales: Tensor, wtscale: Tensor | None) -> Tensor:
    """`[N, Kp]` to packed codes `[N, Kp/2]` under given scales."""
    group_size = GROUP_SIZES[precision_of(wscales)]
    scaled = weight.unflatten(-1, (-1, group_size)) / nonzero(group_scales(wscales, wtscale))[..., None]
    encode = encode_e2m1 if wtscale is not None else encode_int4
    return pack_nibbles(encode(scaled).flatten(-2), group_size)


def decode_weight(qweight: Tensor, wscales: Tensor, wtscale: Tensor | None) -> Tensor:
    """Packed codes `[N, Kp/2]` to numbers, fp32 `[N, Kp]`."""
    group_size = GROUP_SIZES[precision_of(wscales)]
    nibbles = unpack_nibbles(qweight, group_size)
    codes = decode_e2m1(nibbles) if wtscale is not None else decode_int4(nibbles)
    scales = group_scales(wscales, wtscale)
    return (codes.to(scales.dtype).unflatten(-1, (-1, group_size)) * scales[..., None]).flatten(-2)


def row_scales(wscales: Tensor, wtscale: Tensor | None, levels: int) -> Tensor:
    """Per-row scales `[N]`, fp32, that convert a 4-bit weight to integers of -levels..levels.

    They depend on the group scales only: no weight is larger than its group scale times the largest code.
    """
    precision = precision_of(wscales)
    return group_scales(wscales, wtscale).amax(-1) * (MAX_CODES[precision] / levels)


def requantize_rows(
    qweight: Tensor, wscales: Tensor, wtscale: Tensor | None, levels: int = 127
) -> tuple[Tensor, Tensor]:
    """A 4-bit weight as int8 with one scale per row: codes `[N, Kp]` of -levels..levels and scales `[N]`, fp32.

    Adds an error of .8 % (with 63 levels 1.6 %) in quadrature to the 11 % of 4-bit rounding.
    """
    precision = precision_of(wscales)
    group_size = GROUP_SIZES[precision]
    scales = row_scales(wscales, wtscale, levels)
    nibbles = unpack_nibbles(qweight, group_size)
    codes = decode_e2m1(nibbles) if wtscale is not None else decode_int4(nibbles)
    multiplier = group_scales(wscales, wtscale) / nonzero(scales)[:, None]
    scaled = codes.float().unflatten(-1, (-1, group_size)) * multiplier[..., None]
    return scaled.flatten(-2).round().clamp(-levels, levels).to(torch.int8), scales
