"""Gated residual: each program computes a square of tokens and channels of one image.

Per element in bf16: 4 bytes read, 2 written; 2 FLOPs. Memory-bound. Each operand is loaded along its contiguous axis,
so hidden states that are a channels-first image are transposed on chip. The backward pass reads gradient and hidden
states once, writes the product with the gate and one partial sum per program of the gate's gradient; the partial sums
of an image are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_sana.kernels.triton.rows import as_modulation


BLOCK = 64  # tokens and channels: a cache line of half precision either way; the widths of Sana are multiples of it
NUM_WARPS = 4


def _rows_a_program(batch: int, tokens: int, channels: int) -> int:
    """Of the backward pass: a multiple of the block, to about 2048 programs."""
    blocks = batch * triton.cdiv(tokens, BLOCK) * triton.cdiv(channels, BLOCK)
    return BLOCK * triton.cdiv(blocks, 2048)


@triton.jit
def _gated_residual_forward_kernel(
    residual_ptr, x_ptr, gate_ptr, out_ptr,
    tokens, channels, parts_n, parts_c,
    stride_residual_b, stride_residual_n, stride_residual_c, stride_x_b, stride_x_n, stride_x_c, stride_gate,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Neighbours in the grid are neighbours along the channels.
    i_row = tl.program_id(0).to(tl.int64) // parts_c
    i_b = i_row // parts_n
    o_n = ((i_row % parts_n) * BLOCK + tl.arange(0, BLOCK))[:, None]
    o_c = (tl.program_id(0).to(tl.int64) % parts_c) * BLOCK + tl.arange(0, BLOCK)
    mask = (o_n < tokens) & (o_c < channels)[None, :]
    b_gate = tl.load(gate_ptr + i_b * stride_gate + o_c, mask=o_c < channels, other=0.0).to(tl.float32)[None, :]
    o_c = o_c[None, :]
    p_residual = residual_ptr + i_b * stride_residual_b + o_n * stride_residual_n + o_c * stride_residual_c
    b_x = tl.load(x_ptr + i_b * stride_x_b + o_n * stride_x_n + o_c * stride_x_c, mask=mask, other=0.0)
    b_out = tl.load(p_residual, mask=mask, other=0.0).to(tl.float32) + b_gate * b_x.to(tl.float32)
    tl.store(out_ptr + (i_b * tokens + o_n) * channels + o_c, b_out, mask=mask)


@triton.jit
def _gated_residual_backward_kernel(
    grad_ptr, x_ptr, gate_ptr, grad_x_ptr, partial_ptr,
    tokens, channels, parts_n, parts_c,
    stride_grad_b, stride_grad_n, stride_grad_c, stride_x_b, stride_x_n, stride_x_c, stride_gate, rows_a_program,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64) // parts_c
    i_b = i_row // parts_n
    o_c = (tl.program_id(0).to(tl.int64) % parts_c) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < channels
    b_gate = tl.load(gate_ptr + i_b * stride_gate + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    p_grad = grad_ptr + i_b * stride_grad_b + o_c[None, :] * stride_grad_c
    p_x = x_ptr + i_b * stride_x_b + o_c[None, :] * stride_x_c
    b_partial = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, rows_a_program, BLOCK):
        o_n = ((i_row % parts_n) * rows_a_program + start + tl.arange(0, BLOCK))[:, None]
        mask = (o_n < tokens) & m_c[None, :]
        b_grad = tl.load(p_grad + o_n * stride_grad_n, mask=mask, other=0.0).to(tl.float32)
        b_partial += b_grad * tl.load(p_x + o_n * stride_x_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + (i_b * tokens + o_n) * channels + o_c[None, :], b_grad * b_gate, mask=mask)
    tl.store(partial_ptr + i_row * channels + o_c, tl.sum(b_partial, axis=0), mask=m_c)


def gated_residual_forward(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Two tensors `[B, N, C]` and a gate `[B or 1, 1, C]` to `[B, N, C]`, contiguous; see the reference."""
    batch, tokens, channels = x.shape
    out = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    gate, stride_gate = as_modulation(gate)
    parts_n, parts_c = triton.cdiv(tokens, BLOCK), triton.cdiv(channels, BLOCK)
    _gated_residual_forward_kernel[(batch * parts_n * parts_c,)](
        residual, x, gate, out,
        tokens, channels, parts_n, parts_c, *residual.stride(), *x.stride(), stride_gate,
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def gated_residual_backward(grad: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the hidden states `[B, N, C]`, contiguous, and of the gate for each image, `[B, 1, C]` in fp32."""
    batch, tokens, channels = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gate, stride_gate = as_modulation(gate)
    rows_a_program = _rows_a_program(batch, tokens, channels)
    parts_n, parts_c = triton.cdiv(tokens, rows_a_program), triton.cdiv(channels, BLOCK)
    partials = torch.empty((batch, parts_n, channels), dtype=torch.float32, device=x.device)
    _gated_residual_backward_kernel[(batch * parts_n * parts_c,)](
        grad, x, gate, grad_x, partials,
        tokens, channels, parts_n, parts_c, *grad.stride(), *x.stride(), stride_gate, rows_a_program,
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return grad_x, partials.sum(dim=1, keepdim=True)
