"""A quantized weight as one matrix; each program computes one block of it.

Planar bytes contain two strips of K, which are two blocks of the output. Per element: 1/2 byte read (in 8 bits: 1), 2
written; 2 r FLOPs on tensor cores. Bound by memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_sana.kernels.triton.low_bit import (
    as_bits,
    decode_e4m3,
    decode_nibbles,
    decode_scales,
    expand_groups,
    first_halves,
)


BLOCK_N, BLOCK_K, BLOCK_R = 64, 64, 32


@triton.jit
def _dequantize_weight_kernel(
    qweight_ptr, wscales_ptr, wtscale_ptr, smooth_ptr, down_ptr, up_ptr, out_ptr,
    outputs, features, padded, rank,
    G: tl.constexpr, IS_8_BIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_k = tl.program_id(1) * BLOCK_K
    o_j = i_k // 2 + tl.arange(0, BLOCK_K // 2)
    o_g = i_k // G + tl.arange(0, BLOCK_K // G)
    m_n = (o_n < outputs)[:, None]
    if IS_8_BIT:
        b_scales = tl.load(wscales_ptr + o_n, mask=o_n < outputs, other=0.0)[:, None]
    else:
        p_packed = qweight_ptr + o_n[:, None] * (padded // 2) + o_j[None, :]
        b_packed = tl.load(p_packed, mask=m_n & (o_j < padded // 2)[None, :], other=0)
        p_wscales = wscales_ptr + o_n[:, None] * (padded // G) + o_g[None, :]
        b_scales = decode_scales(tl.load(p_wscales, mask=m_n & (o_g < padded // G)[None, :], other=0))
        if wtscale_ptr is not None:
            b_scales *= tl.load(wtscale_ptr + o_n, mask=o_n < outputs, other=0.0).to(tl.float32)[:, None]
        b_scales = expand_groups(b_scales, G // 2)

    for half in tl.static_range(2):
        o_k = i_k + first_halves(BLOCK_K, G) + half * (G // 2)
        m_k = (o_k < features)[None, :]
        b_smooth = tl.load(smooth_ptr + o_k, mask=o_k < features, other=1.0).to(tl.float32)
        if IS_8_BIT:
            b_codes = tl.load(qweight_ptr + o_n[:, None] * padded + o_k[None, :], mask=m_n & m_k, other=0)
            if b_codes.dtype == tl.uint8:
                b_sizes = decode_e4m3(b_codes & 127).to(tl.float32)
                b_values = tl.where(b_codes < 128, b_sizes, -b_sizes)
            else:
                b_values = b_codes.to(tl.float32)
        else:
            b_values = decode_nibbles((b_packed >> (4 * half)) & 15, G == 16)
        b_out = b_values * b_scales * (1.0 / b_smooth)[None, :]
        for start in range(0, rank, BLOCK_R):
            o_r = start + tl.arange(0, BLOCK_R)
            m_r = o_r < rank
            b_up = tl.load(up_ptr + o_n[:, None] * rank + o_r[None, :], mask=m_n & m_r[None, :], other=0.0)
            p_down = down_ptr + o_r[:, None].to(tl.int64) * features + o_k[None, :]
            b_down = tl.load(p_down, mask=m_r[:, None] & m_k, other=0.0)
            if b_up.dtype != b_down.dtype:
                b_up, b_down = b_up.to(tl.float32), b_down.to(tl.float32)
            b_out = tl.dot(b_up, b_down, b_out, input_precision="ieee")
        tl.store(out_ptr + o_n[:, None] * features + o_k[None, :], b_out, mask=m_n & m_k)


def dequantize_weight_forward(
    qweight: Tensor,
    wscales: Tensor,
    wtscale: Tensor | None,
    smooth: Tensor,
    down: Tensor,
    up: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`[N, K]` in `dtype`; see the reference."""
    outputs, (rank, features) = qweight.shape[0], down.shape
    is_8_bit = wscales.dim() == 1
    padded = qweight.shape[1] if is_8_bit else 2 * qweight.shape[1]
    out = up.new_empty((outputs, features), dtype=dtype)
    _dequantize_weight_kernel[(triton.cdiv(outputs, BLOCK_N), triton.cdiv(features, BLOCK_K))](
        qweight.contiguous(), as_bits(wscales), wtscale, smooth.contiguous(), down.contiguous(), up.contiguous(), out,
        outputs, features, padded, rank,
        G=64 if wtscale is None else 16, IS_8_BIT=is_8_bit,
        BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, num_warps=4,
    )  # fmt: skip
    return out
