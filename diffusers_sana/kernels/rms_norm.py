"""Root-mean-square norm over the last axis (arXiv 1910.07467), with optional bias and residual.

    out = x / sqrt(mean(x^2) + eps) * weight [+ bias] [+ residual]

Everything is computed in fp32 and rounded once at the end: closer to fp32 than the diffusers class, which rounds
three times.

On a CPU the rows are computed in blocks that stay in the cache: three to eight times faster than whole tensors, and
without fp32 copies of them.

Legend: R rows, C channels.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.cpu.blocked import row_blocks
from diffusers_sana.kernels.dispatch import triton_operator, use_triton
from diffusers_sana.kernels.precision import is_inference


MAX_CHANNELS = 16384  # a row must fit into the registers of one program


def rms_norm(
    hidden_states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """RMS norm of the last axis of `hidden_states`.

    Args:
        hidden_states: `[..., C]`.
        weight, bias: `[C]`.
        residual: `[..., C]`, added after the norm.

    Returns:
        `[..., C]` in the dtype of `hidden_states`.
    """
    channels = hidden_states.shape[-1]
    reason = f"more than {MAX_CHANNELS} channels, {channels}" if channels > MAX_CHANNELS else None
    if use_triton("rms_norm", hidden_states, weight, bias, residual, unsupported=reason):
        return _rms_norm_triton(hidden_states, weight, bias, residual, eps)
    if hidden_states.device.type == "cpu" and is_inference(hidden_states, weight, bias, residual):
        block = partial(rms_norm_reference, weight=weight, bias=bias, eps=eps)
        return row_blocks(lambda rows, residual: block(rows, residual=residual), hidden_states, residual)
    return rms_norm_reference(hidden_states, weight, bias, eps=eps, residual=residual)


def rms_norm_reference(
    hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None = None,
    *, eps: float = 1e-5, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula in PyTorch; float64 inputs give the reference result."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    out = hidden_states.to(dtype)
    out = out * torch.rsqrt(out.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    if residual is not None:
        out = out + residual
    return out.to(hidden_states.dtype)


@triton_operator("rms_norm_backward(Tensor grad, Tensor hidden_states, Tensor? weight, float eps) -> (Tensor, Tensor)")
def _rms_norm_backward_triton(grad: Tensor, hidden_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    grad_parameters = hidden_states.new_empty((2, hidden_states.shape[-1]), dtype=torch.float32)
    return hidden_states.new_empty(hidden_states.shape), grad_parameters


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    hidden_states, weight, bias, residual, ctx.eps = inputs
    ctx.save_for_backward(hidden_states, weight)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias, residual)]


def _backward(ctx: Any, grad: Tensor) -> tuple:
    grad_input, grad_parameters = _rms_norm_backward_triton(grad, *ctx.saved_tensors, ctx.eps)
    weight, bias, residual = (
        None if dtype is None else value.to(dtype)
        for value, dtype in zip((*grad_parameters, grad), ctx.dtypes, strict=True)
    )
    return grad_input, weight, bias, residual, None


@triton_operator(
    "rms_norm_forward(Tensor hidden_states, Tensor? weight, Tensor? bias, Tensor? residual, float eps) -> Tensor",
    autograd=(_setup_context, _backward),
)
def _rms_norm_triton(hidden_states: Tensor, *_: Any) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)
