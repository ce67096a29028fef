"""A 4-bit weight as int8 with one scale per row: for `lowbit_linear`, in its registers or before it.

Each program converts a few rows. Per element: 1/2 byte read, 1 written. Memory-bound.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_sana.kernels.triton.low_bit import (
    as_bits,
    decode_nibbles,
    decode_scales,
    expand_groups,
    first_halves,
    round_to_int,
)


BLOCK_N, BLOCK_K, BLOCK_G = 8, 256, 64


@triton.jit
def row_scales(wscales_ptr, o_n, groups, IS_NVFP4: tl.constexpr, BLOCK_G: tl.constexpr):
    """Scales with which the rows of a weight become integers of -127..127."""
    o_g = tl.arange(0, BLOCK_G)
    b_largest = tl.zeros([o_n.shape[0], BLOCK_G], tl.float32)
    for start in range(0, groups, BLOCK_G):
        p_wscales = wscales_ptr + o_n[:, None] * groups + start + o_g[None, :]
        b_largest = tl.maximum(
            b_largest, decode_scales(tl.load(p_wscales, mask=(start + o_g < groups)[None, :], other=0))
        )
    return tl.max(b_largest, axis=1) * ((6.0 if IS_NVFP4 else 7.0) / 127)


@triton.jit
def multipliers(b_wscales, b_rows, SIZE: tl.constexpr):
    """From codes to integers of their row, for `SIZE` neighbours each.

    e2m1 times a ratio of e4m3 numbers often lies half way between two integers, so this has to be the reference's
    division, to the last bit.
    """
    return expand_groups(tl.div_rn(decode_scales(b_wscales), tl.where(b_rows == 0, 1.0, b_rows)[:, None]), SIZE)


@triton.jit
def requantize(b_nibbles, b_multipliers, IS_NVFP4: tl.constexpr):
    """Nibbles to integers of their row. int4's -8, which only others write, would be less than an int8 can hold."""
    return round_to_int(tl.maximum(decode_nibbles(b_nibbles, IS_NVFP4) * b_multipliers, -127.0)).to(tl.int8)


@triton.jit
def _requantize_kernel(
    qweight_ptr, wscales_ptr, wtscale_ptr, weight_ptr, rows_ptr,
    outputs, features,
    G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A 4-bit weight to int8 with one scale a row."""
    IS_NVFP4: tl.constexpr = G == 16
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < outputs
    o_n = tl.minimum(o_n, outputs - 1)
    b_rows = row_scales(wscales_ptr, o_n, features // G, IS_NVFP4, BLOCK_G)
    o_j, o_g, o_k = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // G), first_halves(BLOCK_K, G)
    for start in range(0, features, BLOCK_K):
        m_j, m_g, m_k = start // 2 + o_j < features // 2, start // G + o_g < features // G, start + o_k < features
        p_wscales = wscales_ptr + o_n[:, None] * (features // G) + start // G + o_g[None, :]
        b_multipliers = multipliers(tl.load(p_wscales, mask=m_g[None, :], other=0), b_rows, G // 2)
        p_packed = qweight_ptr + o_n[:, None] * (features // 2) + start // 2 + o_j[None, :]
        b_packed = tl.load(p_packed, mask=m_j[None, :], other=0)
        p_weight = weight_ptr + o_n[:, None] * features + start + o_k[None, :]
        mask = m_n[:, None] & m_k[None, :]
        tl.store(p_weight, requantize(b_packed & 15, b_multipliers, IS_NVFP4), mask=mask)
        tl.store(p_weight + G // 2, requantize(b_packed >> 4, b_multipliers, IS_NVFP4), mask=mask)
    if wtscale_ptr is not None:
        b_rows *= tl.load(wtscale_ptr + o_n).to(tl.float32)
    tl.store(rows_ptr + o_n, b_rows, mask=m_n)


def requantize_rows(qweight: Tensor, wscales: Tensor, wtscale: Tensor | None) -> tuple[Tensor, Tensor]:
    """A 4-bit weight as int8 `[N, Kp]` with one scale per row, fp32 `[N]`; see `requantize_rows` in `low_bit.py`."""
    outputs, features = qweight.shape[0], 2 * qweight.shape[1]
    weight = qweight.new_empty((outputs, features), dtype=torch.int8)
    rows = qweight.new_empty((outputs,), dtype=torch.float32)
    _requantize_kernel[(triton.cdiv(outputs, BLOCK_N),)](
        qweight.contiguous(), as_bits(wscales), wtscale, weight, rows, outputs, features,
        G=64 if wtscale is None else 16, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_G=BLOCK_G, num_warps=4,
    )  # fmt: skip
    return weight, rows
