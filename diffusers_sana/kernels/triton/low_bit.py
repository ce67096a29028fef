"""Common functions of the SVDQuant kernels: nibbles, e4m3 scales and small floats, by integer arithmetic.

They are the same on every architecture: not all have e4m3, and none has a scalar e2m1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_sana._compat import triton_driver, triton_knobs


INTERPRETED = triton_knobs.runtime.interpret


def architecture() -> int:
    """NVIDIA's compute capability without the dot, e.g. 90; 0 for anything else."""
    if INTERPRETED:
        return 0
    target = triton_driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def as_bits(scales: Tensor) -> Tensor:
    """e4m3 scales as bytes, others as they are; contiguous."""
    scales = scales.contiguous()
    return scales if scales.itemsize > 1 else scales.view(torch.uint8)


@triton.jit
def round_to_int(x):
    """The nearest integer, half to even, for |x| < 2^22: from there on fp32 has no digits after the point."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def encode_float(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """The code of the nearest number of a small floating point format, ties to the even code.

    For non-negative fp32 `x` that the format can hold; int32.
    """
    SHIFT: tl.constexpr = 23 - MANTISSA
    b_bits = x.to(tl.int32, bitcast=True)
    b_bits += (1 << (SHIFT - 1)) - 1 + ((b_bits >> SHIFT) & 1)
    b_normal = (b_bits >> SHIFT) - ((127 - BIAS) << MANTISSA)
    return tl.where(x < 2.0 ** (1 - BIAS), round_to_int(x * 2.0 ** (BIAS - 1 + MANTISSA)), b_normal)


@triton.jit
def decode_e2m1(b_nibbles):
    """0..15 in uint8 to fp16: the same fields, wider, and an exponent whose bias is 14 more."""
    b_nibbles = b_nibbles.to(tl.int16)
    return ((b_nibbles & 7) << 9 | (b_nibbles & 8) << 12).to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def decode_e4m3(b_bits):
    """Bits of non-negative numbers, in uint8, to fp16, in the same way."""
    return (b_bits.to(tl.int16) << 7).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def decode_nibbles(b_nibbles, IS_NVFP4: tl.constexpr):
    """0..15 in uint8 to the numbers they stand for, fp32."""
    if IS_NVFP4:
        b_values = decode_e2m1(b_nibbles).to(tl.float32)
    else:
        # 2^23 + n has the bits of 2^23 with n for the last ones: cheaper than a conversion.
        b_values = ((b_nibbles.to(tl.int32) ^ 8) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    return b_values


@triton.jit
def decode_scales(b_scales):
    """Stored scales to fp32; e4m3 ones come as bytes."""
    return (decode_e4m3(b_scales) if b_scales.dtype == tl.uint8 else b_scales).to(tl.float32)


@triton.jit
def expand_groups(b_scales, SIZE: tl.constexpr):
    """`[R, groups]` to `[R, groups * SIZE]`, each repeated."""
    b_all = tl.broadcast_to(b_scales[:, :, None], [b_scales.shape[0], b_scales.shape[1], SIZE])
    return b_all.reshape(b_scales.shape[0], b_scales.shape[1] * SIZE)


@triton.jit
def first_halves(BLOCK_K: tl.constexpr, G: tl.constexpr):
    """Positions along K of the low nibbles of `BLOCK_K / 2` bytes; those of the high nibbles are G / 2 further on."""
    o_j = tl.arange(0, BLOCK_K // 2)
    return o_j // (G // 2) * G + o_j % (G // 2)
