"""Modulated layer norm: each program reads a few rows of one image once and reduces them in registers.

Per element in bf16: 2 bytes read, 2 written; about 8 FLOPs. Memory-bound. The backward pass reads rows and gradients
once and writes one partial sum per program of the gradients of scale and shift; the partial sums of an image are added
in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_sana.kernels.triton.rows import MAX_PARTIALS, as_modulation, as_rows, row_blocks


NUM_WARPS = 8


def _rows_a_program(rows: int, block_r: int) -> int:
    """Of the backward pass: a multiple of `block_r`.

    16 rows at least, so that the partial sums (16 bytes a channel, written and read) are little beside the rows (6
    bytes an element).
    """
    return block_r * max(triton.cdiv(16, block_r), triton.cdiv(rows, block_r * MAX_PARTIALS))


@triton.jit
def _modulated_layer_norm_forward_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr,
    tokens, channels, parts, stride_x, stride_scale, stride_shift, eps,
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
    b_scale = 1.0 + tl.load(scale_ptr + i_b * stride_scale + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_shift = tl.load(shift_ptr + i_b * stride_shift + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_x -= tl.sum(b_x, axis=1)[:, None] / channels
    b_x = tl.where(m_c[None, :], b_x, 0.0)
    b_rsqrt = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / channels + eps)[:, None]
    tl.store(out_ptr + o_r * channels + o_c[None, :], b_x * b_rsqrt * b_scale + b_shift, mask=mask)


@triton.jit
def _modulated_layer_norm_backward_kernel(
    grad_ptr, x_ptr, scale_ptr, grad_x_ptr, partial_scale_ptr, partial_shift_ptr,
    tokens, channels, parts, stride_grad, stride_x, stride_scale, eps, rows_a_program,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    i_b = i_p // parts
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    b_scale = 1.0 + tl.load(scale_ptr + i_b * stride_scale + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_partial_scale = tl.zeros([BLOCK_C], tl.float32)
    b_partial_shift = tl.zeros([BLOCK_C], tl.float32)
    for start in tl.range(0, rows_a_program, BLOCK_R, num_stages=3):  # loads run ahead of the reductions
        o_n = (i_p % parts) * rows_a_program + start + tl.arange(0, BLOCK_R)
        o_r = (i_b * tokens + o_n)[:, None]
        mask = (o_n < tokens)[:, None] & m_c[None, :]
        b_x = tl.load(x_ptr + o_r * stride_x + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        b_grad = tl.load(grad_ptr + o_r * stride_grad + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        b_x -= tl.sum(b_x, axis=1)[:, None] / channels
        b_x = tl.where(m_c[None, :], b_x, 0.0)
        b_rsqrt = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / channels + eps)[:, None]
        b_normed = b_x * b_rsqrt
        b_partial_scale += tl.sum(b_grad * b_normed, axis=0)
        b_partial_shift += tl.sum(b_grad, axis=0)
        b_scaled = b_grad * b_scale
        b_mean = tl.sum(b_scaled, axis=1)[:, None] / channels
        b_mean_normed = tl.sum(b_scaled * b_normed, axis=1)[:, None] / channels
        b_grad_x = (b_scaled - b_mean - b_normed * b_mean_normed) * b_rsqrt
        tl.store(grad_x_ptr + o_r * channels + o_c[None, :], b_grad_x, mask=mask)
    tl.store(partial_scale_ptr + i_p * channels + o_c, b_partial_scale, mask=m_c)
    tl.store(partial_shift_ptr + i_p * channels + o_c, b_partial_shift, mask=m_c)


def modulated_layer_norm_forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`[B, N, C]`, modulated by `[B or 1, 1, C]`, to the same shape, contiguous; see the reference."""
    batch, tokens, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = as_rows(x)
    (scale, stride_scale), (shift, stride_shift) = as_modulation(scale), as_modulation(shift)
    block_r, block_c = row_blocks(channels)
    parts = triton.cdiv(tokens, block_r)
    _modulated_layer_norm_forward_kernel[(batch * parts,)](
        x, scale, shift, out,
        tokens, channels, parts, x.stride(0), stride_scale, stride_shift, eps,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def modulated_layer_norm_backward(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the input `[B, N, C]`, and of scale and shift for each image, `[2, B, 1, C]` in fp32."""
    batch, tokens, channels = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad, x = as_rows(grad), as_rows(x)
    scale, stride_scale = as_modulation(scale)
    block_r, block_c = row_blocks(channels)
    rows_a_program = _rows_a_program(batch * tokens, block_r)
    parts = triton.cdiv(tokens, rows_a_program)
    partials = torch.empty((2, batch, parts, channels), dtype=torch.float32, device=x.device)
    _modulated_layer_norm_backward_kernel[(batch * parts,)](
        grad, x, scale, grad_x, partials[0], partials[1],
        tokens, channels, parts, grad.stride(0), x.stride(0), stride_scale, eps, rows_a_program,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip
    return grad_x, partials.sum(dim=2, keepdim=True)
