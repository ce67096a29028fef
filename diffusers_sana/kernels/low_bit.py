"""The number formats of weights: codes, scales, packing (SVDQuant, arXiv 2411.05007; NVFP4: OCP e2m1, e4m3 scales).

    int4    codes -7..7 (two's complement), one scale per 64 neighbours along K
    nvfp4   codes of {0, .5, 1, 1.5, 2, 3, 4, 6} and a sign bit, one e4m3 scale per 16 neighbours, one scale per row
    int8    codes -127..127, one fp32 scale per row: its largest magnitude / 127 (LLM.int8(), arXiv 2208.07339)
    float8  e4m3 numbers (FP8 Formats for Deep Learning, arXiv 2209.05433), kept as bytes, one fp32 scale per row; only
            read from files, never made here

Two 4-bit values share a byte, planar within their group of G: byte j holds element j in its low half and element j +
G/2 in its high half, so unpacking gives two contiguous halves without interleaving. K is padded with zero codes to a
multiple of 64.

Legend: N output features, K input features, Kp = K padded, G group size, R rows of anything.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


GROUP_SIZES = {"int4": 64, "nvfp4": 16}  # a row in 8 bits has one scale
MAX_CODES = {"int4": 7.0, "nvfp4": 6.0, "int8": 127.0}  # the largest magnitude of a code
K_MULTIPLE = 64
E4M3_MAX = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def precision_of(wscales: Tensor, qweight: Tensor | None = None) -> str:
    """The format of a layer: in 8 bits scales are a vector, NVFP4 has them in e4m3, and codes of float8 are bytes.

    Without codes it is the format to which a weight is rounded with such scales.
    """
    if wscales.dim() == 1:
        return "float8" if qweight is not None and qweight.dtype == torch.uint8 else "int8"
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


def encode_int8(scaled: Tensor) -> Tensor:
    """Numbers in units of their scale to integers: round half to even, clamp to -127..127."""
    return scaled.round().clamp(-127, 127).to(torch.int8)


def decode_float8(codes: Tensor) -> Tensor:
    """Bytes to numbers in fp32."""
    return codes.view(torch.float8_e4m3fn).float()


# From numbers in units of their scale to codes, and back.
CODECS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "int4": (encode_int4, decode_int4),
    "nvfp4": (encode_e2m1, decode_e2m1),
    "int8": (encode_int8, lambda codes: codes),
}


def pack_codes(codes: Tensor, precision: str) -> Tensor:
    """Codes `[R, Kp]` as they are stored: nibbles in bytes `[R, Kp/2]`, those in 8 bits as they are."""
    return pack_nibbles(codes, GROUP_SIZES[precision]) if precision in GROUP_SIZES else codes


def unpack_codes(qweight: Tensor, precision: str) -> Tensor:
    """The inverse of `pack_codes`."""
    return unpack_nibbles(qweight, GROUP_SIZES[precision]) if precision in GROUP_SIZES else qweight


def nonzero(scale: Tensor) -> Tensor:
    """A scale to divide by: 1 in place of the scale 0 of groups of zeros, whose codes stay 0."""
    return torch.where(scale == 0, 1.0, scale)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale in fp32, or 0 for scales so small that it could be infinite: what they scale becomes 0."""
    scale = scale.float()
    return torch.where(scale < 1e-37, 0.0, 1 / scale)


def weight_scales(weight: Tensor, precision: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales by which the largest magnitude of each group, or of each row in int8, is representable.

    Args:
        weight: `[N, Kp]`, fp32.
        precision: "int4", "nvfp4" or "int8".
        dtype: in which scales of int4 are stored.

    Returns:
        `wscales`: `[N, Kp/G]` in `dtype` or e4m3; for int8 `[N]` in fp32.
        `wtscale`: for nvfp4 `[N]`: powers of two, which every dtype represents exactly, by which the largest group
            scale of the row is at the top of e4m3.
    """
    if precision == "int8":
        return weight.abs().amax(-1) / MAX_CODES[precision], None
    amax = weight.unflatten(-1, (-1, GROUP_SIZES[precision])).abs().amax(-1)
    scales = amax / MAX_CODES[precision]
    if precision == "int4":
        return scales.to(dtype), None
    largest = scales.amax(-1)
    wtscale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest / E4M3_MAX).exponent)
    return (scales / wtscale[:, None]).to(torch.float8_e4m3fn), wtscale.to(dtype)


def group_scales(wscales: Tensor, wtscale: Tensor | None) -> Tensor:
    """All scales of a weight multiplied, fp32 `[N, Kp/G]` (fp64 where they are), in 8 bits `[N, 1]`."""
    scales = wscales if wscales.dtype == torch.float64 else wscales.float()
    if wscales.dim() == 1:
        return scales[:, None]
    return scales if wtscale is None else scales * wtscale.to(scales.dtype)[:, None]


def encode_weight(weight: Tensor, wscales: Tensor, wtscale: Tensor | None) -> Tensor:
    """`[N, Kp]` to codes as they are stored, under given scales: `[N, Kp/2]`, for int8 `[N, Kp]`."""
    precision = precision_of(wscales)
    scales = nonzero(group_scales(wscales, wtscale))
    scaled = weight.unflatten(-1, (scales.shape[-1], -1)) / scales[..., None]
    return pack_codes(CODECS[precision][0](scaled).flatten(-2), precision)


def decode_weight(qweight: Tensor, wscales: Tensor, wtscale: Tensor | None) -> Tensor:
    """Stored codes to numbers, fp32 `[N, Kp]`."""
    return _scaled(qweight, wscales, group_scales(wscales, wtscale))


def _scaled(qweight: Tensor, wscales: Tensor, scales: Tensor) -> Tensor:
    """The numbers of stored codes times scales of their groups `[N, Kp/G]`, in the dtype of those."""
    precision = precision_of(wscales, qweight)
    decode = decode_float8 if precision == "float8" else CODECS[precision][1]
    codes = decode(unpack_codes(qweight, precision)).to(scales.dtype)
    if precision not in GROUP_SIZES:
        return codes * scales
    return (codes.unflatten(-1, (-1, GROUP_SIZES[precision])) * scales[..., None]).flatten(-2)


def swizzled(scales: Tensor) -> Tensor:
    """e4m3 scales `[N, G]` in the order of block-scaled matrix products, with rows padded to 128 and groups to 4."""
    rows, groups = scales.shape
    padded = F.pad(scales.view(torch.uint8), (0, -groups % 4, 0, -rows % 128))
    tiles = padded.view(-1, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).view(scales.dtype)


def unswizzled(scales: Tensor, rows: int, groups: int) -> Tensor:
    """The inverse of `swizzled`, without the padding."""
    high, wide = -(-rows // 128) * 128, -(-groups // 4) * 4
    tiles = scales.view(torch.uint8).reshape(high // 128, wide // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high, wide)[:rows, :groups].contiguous().view(scales.dtype)


def row_scales(wscales: Tensor, wtscale: Tensor | None, levels: int) -> Tensor:
    """Per-row scales `[N]`, fp32, that convert a weight to integers of -levels..levels.

    They depend on the stored scales only: no weight is larger than its group scale times the largest code.
    """
    return group_scales(wscales, wtscale).amax(-1) * (MAX_CODES[precision_of(wscales)] / levels)


def requantize_rows(
    qweight: Tensor, wscales: Tensor, wtscale: Tensor | None, levels: int = 127
) -> tuple[Tensor, Tensor]:
    """A weight as int8 with one scale per row: codes `[N, Kp]` of -levels..levels and scales `[N]`, fp32.

    Adds an error of .8 % (with 63 levels 1.6 %) in quadrature to the 11 % of 4-bit rounding. int8 stays as it is if
    `levels` is 127; 63 levels add 1.6 % to its .8 %.
    """
    if precision_of(wscales) == "int8" and levels == 127:
        return qweight, wscales.float()
    scales = row_scales(wscales, wtscale, levels)
    scaled = _scaled(qweight, wscales, group_scales(wscales, wtscale) / nonzero(scales)[:, None])
    return scaled.round().clamp(-levels, levels).to(torch.int8), scales
