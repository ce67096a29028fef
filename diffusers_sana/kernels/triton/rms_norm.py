"""RMS norm of rows: each program reads a few rows once, reduces them in registers and writes them once.

Per element of a bf16 row: 2 bytes read, 2 written, and 2 more for the residual; about 6 FLOPs. Memory-bound. The
backward pass writes one partial sum per program of the parameters' gradients; they are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_sana.kernels.triton.rows import MAX_PARTIALS, as_rows


def _launch_config(channels: int) -> tuple[int, int, int]:
    """Rows and channels of a block, and warps: at most 4096 elements per program, 16 per thread."""
    block_c = triton.next_power_of_2(channels)
    block_r = max(1, 4096 // block_c)
    return block_r, block_c, min(max(block_r * block_c // 512, 4), 16)


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    rows, channels, stride_x, stride_residual, eps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    mask = (o_r < rows)[:, None] & m_c[None, :]

    b_x = tl.load(x_ptr + o_r[:, None] * stride_x + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    b_out = b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=1) / channels + eps)[:, None]
    if weight_ptr is not None:
        b_out *= tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        b_out += tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        p_residual = residual_ptr + o_r[:, None] * stride_residual + o_c[None, :]
        b_out += tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + o_r[:, None] * channels + o_c[None, :], b_out, mask=mask)


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, grad_x_ptr, partial_weight_ptr, partial_bias_ptr,
    rows, channels, stride_grad, stride_x, eps, rows_a_program,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    b_weight = tl.full([BLOCK_C], 1.0, tl.float32)
    if weight_ptr is not None:
        b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_partial_weight = tl.zeros([BLOCK_C], tl.float32)
    b_partial_bias = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, rows_a_program, BLOCK_R):
        o_r = i_p * rows_a_program + start + tl.arange(0, BLOCK_R)
        mask = (o_r < rows)[:, None] & m_c[None, :]
        b_x = tl.load(x_ptr + o_r[:, None] * stride_x + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        b_grad = tl.load(grad_ptr + o_r[:, None] * stride_grad + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        b_rsqrt = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / channels + eps)[:, None]
        b_normed = b_x * b_rsqrt
        b_scaled = b_grad * b_weight[None, :]
        b_mean = tl.sum(b_scaled * b_normed, axis=1)[:, None] / channels
        tl.store(
            grad_x_ptr + o_r[:, None] * channels + o_c[None, :], (b_scaled - b_normed * b_mean) * b_rsqrt, mask=mask
        )
        b_partial_weight += tl.sum(b_grad * b_normed, axis=0)
        b_partial_bias += tl.sum(b_grad, axis=0)
    tl.store(partial_weight_ptr + i_p * channels + o_c, b_partial_weight, mask=m_c)
    tl.store(partial_bias_ptr + i_p * channels + o_c, b_partial_bias, mask=m_c)


def rms_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> Tensor:
    """`[..., C]` to the same shape, contiguous; see the reference."""
    channels = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, residual = as_rows(x), None if residual is None else as_rows(residual)
    block_r, block_c, num_warps = _launch_config(channels)
    _rms_norm_forward_kernel[(triton.cdiv(x.shape[0], block_r),)](
        x, weight, bias, residual, out,
        x.shape[0], channels, x.stride(0), 0 if residual is None else residual.stride(0), eps,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=num_warps,
    )  # fmt: skip
    return out


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the input `[..., C]`, and of weight and bias `[2, C]` in fp32."""
    channels = x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad, x = as_rows(grad), as_rows(x)
    block_r, block_c, num_warps = _launch_config(channels)
    rows_a_program = block_r * max(1, triton.cdiv(x.shape[0], block_r * MAX_PARTIALS))
    num_programs = triton.cdiv(x.shape[0], rows_a_program)
    partials = torch.empty((2, num_programs, channels), dtype=torch.float32, device=x.device)
    _rms_norm_backward_kernel[(num_programs,)](
        grad, x, weight, grad_x, partials[0], partials[1],
        x.shape[0], channels, grad.stride(0), x.stride(0), eps, rows_a_program,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=num_warps,
    )  # fmt: skip
    return grad_x, partials.sum(dim=1)
