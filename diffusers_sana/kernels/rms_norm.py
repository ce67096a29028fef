"""Root-mean-square norm over the last axis (arXiv 1910.07467), with optional bias and residual.

    out = x / sqrt(mean(x^2) + eps) * weight [+ bias] [+ residual]

Everything is computed in fp32 and rounded once at the end: closer to fp32 than the three roundings of the stock
diffusers class.

On a CPU the rows go through in blocks that stay in the cache: three to eight times faster than tensor by tensor, and
without fp32 copies of the whole.

Legend: R rows, C channels.
"""

from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.dispatch import use_triton
from diffusers_sana.kernels.precision import is_inference


CPU_BLOCK = 2**18  # elements: 1 MiB of fp32
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
    unless = f"more than {MAX_CHANNELS} channels, {channels}" if channels > MAX_CHANNELS else None
    if use_triton("rms_norm", hidden_states, weight, bias, residual, unless=unless):
        return _rms_norm_triton(hidden_states, weight, bias, residual, eps)
    if hidden_states.device.type == "cpu" and is_inference(hidden_states, weight, bias, residual):
        return _rms_norm_in_blocks(hidden_states, weight, bias, residual, eps)
    return rms_norm_reference(hidden_states, weight, bias, eps=eps, residual=residual)


def rms_norm_reference(
    hidden_states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """The formula in PyTorch; float64 inputs give the gold standard."""
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


def _rms_norm_in_blocks(
    hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> Tensor:
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    residual = None if residual is None else residual.reshape(rows.shape)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    size = max(1, CPU_BLOCK // rows.shape[1])
    for start in range(0, rows.shape[0], size):
        block = slice(start, start + size)
        out[block] = rms_norm_reference(
            rows[block], weight, bias, eps=eps, residual=None if residual is None else residual[block]
        )
    return out.view(hidden_states.shape)


@torch.library.custom_op("diffusers_sana::rms_norm", mutates_args=())
def _rms_norm_triton(
    hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> Tensor:
    from diffusers_sana.kernels.triton.rms_norm import rms_norm_forward

    return rms_norm_forward(hidden_states, weight, bias, residual, eps)


@_rms_norm_triton.register_fake
def _(hidden_states: Tensor, weight: Any, bias: Any, residual: Any, eps: float) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


@torch.library.custom_op("diffusers_sana::rms_norm_backward", mutates_args=())
def _rms_norm_backward_triton(
    grad: Tensor, hidden_states: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    from diffusers_sana.kernels.triton.rms_norm import rms_norm_backward

    return rms_norm_backward(grad, hidden_states, weight, eps)


@_rms_norm_backward_triton.register_fake
def _(grad: Tensor, hidden_states: Tensor, weight: Any, eps: float) -> tuple[Tensor, Tensor]:
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


_rms_norm_triton.register_autograd(_backward, setup_context=_setup_context)
