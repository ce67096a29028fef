"""Residual connection and modulated layer norm: each program has a few rows of one image in its registers.

Per element in bf16: 4 bytes read, 4 written; about 10 FLOPs. Memory-bound. The two kernels that it stands for read 6
bytes and write 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_sana.kernels.triton.rows import as_modulation, as_rows, row_blocks


NUM_WARPS = 8


@triton.jit
def _gated_residual_norm_kernel(
    residual_ptr, x_ptr, gate_ptr, scale_ptr, shift_ptr, sum_ptr, out_ptr,
    tokens, channels, parts, stride_residual, stride_x, stride_gate, stride_scale, stride_shift, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    i_b = i_p // parts
    o_n = (i_p % parts) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_r = (i_b * tokens + o_n)[:, None]
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    mask = (o_n < tokens)[:, None] & m_c[None, :]

    b_x = tl.load(x_ptr + o_r * stride_x + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    b_sum = tl.load(residual_ptr + o_r * stride_residual + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    if gate_ptr is None:
        b_sum += b_x
    else:
        b_sum += tl.load(gate_ptr + i_b * stride_gate + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :] * b_x
    b_scale = 1.0 + tl.load(scale_ptr + i_b * stride_scale + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_shift = tl.load(shift_ptr + i_b * stride_shift + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_rounded = b_sum.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + o_r * channels + o_c[None, :], b_rounded, mask=mask)
    b_x = b_rounded.to(tl.float32)
    b_x -= tl.sum(b_x, axis=1)[:, None] / channels
    b_x = tl.where(m_c[None, :], b_x, 0.0)
    b_rsqrt = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / channels + eps)[:, None]
    tl.store(out_ptr + o_r * channels + o_c[None, :], b_x * b_rsqrt * b_scale + b_shift, mask=mask)


def gated_residual_norm_forward(
    residual: Tensor, x: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Two tensors `[B, N, C]` to the sum and its norm, contiguous; modulations `[B or 1, 1, C]`; see the reference."""
    batch, tokens, channels = x.shape
    total, out = (torch.empty(x.shape, dtype=residual.dtype, device=x.device) for _ in range(2))
    residual, x = as_rows(residual), as_rows(x)
    gate, stride_gate = (None, 0) if gate is None else as_modulation(gate)
    (scale, stride_scale), (shift, stride_shift) = as_modulation(scale), as_modulation(shift)
    block_r, block_c = row_blocks(channels)
    parts = triton.cdiv(tokens, block_r)
    _gated_residual_norm_kernel[(batch * parts,)](
        residual, x, gate, scale, shift, total, out,
        tokens, channels, parts, residual.stride(0), x.stride(0), stride_gate, stride_scale, stride_shift, eps,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip
    return total, out
