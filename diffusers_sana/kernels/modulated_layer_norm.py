"""Layer norm without parameters, followed by the affine modulation of adaLN (DiT, arXiv 2212.09748).

    out = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift

Computed in fp32 and rounded once.

Legend: B batch, N tokens, C channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.dispatch import triton_operator, unsupported_modulation, use_triton


MAX_CHANNELS = 4096  # a row, its gradient and the modulation must fit into the registers of one program


def modulated_layer_norm(hidden_states: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Layer norm of the last axis, scaled by `1 + scale` and shifted.

    Args:
        hidden_states: `[B, N, C]`.
        scale, shift: `[B or 1, 1, C]`, which may be views; other broadcastable shapes run the reference.

    Returns:
        `[B, N, C]` in the dtype of `hidden_states`.
    """
    channels = hidden_states.shape[-1]
    reason = unsupported_modulation(hidden_states, scale, shift)
    if reason is None and channels > MAX_CHANNELS:
        reason = f"more than {MAX_CHANNELS} channels, {channels}"
    if use_triton("modulated_layer_norm", hidden_states, scale, shift, unsupported=reason):
        return _modulated_layer_norm_triton(hidden_states, scale, shift, eps)
    return modulated_layer_norm_reference(hidden_states, scale, shift, eps=eps)


def modulated_layer_norm_reference(
    hidden_states: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """The formula in PyTorch; float64 inputs give the reference result."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    out = F.layer_norm(hidden_states.to(dtype), hidden_states.shape[-1:], eps=eps)
    return torch.addcmul(shift.to(dtype), out, 1 + scale.to(dtype)).to(hidden_states.dtype)


@triton_operator(
    "modulated_layer_norm_backward(Tensor grad, Tensor hidden_states, Tensor scale, float eps) -> (Tensor, Tensor)"
)
def _modulated_layer_norm_backward_triton(grad: Tensor, hidden_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, _tokens, channels = hidden_states.shape
    grad_modulation = hidden_states.new_empty((2, batch, 1, channels), dtype=torch.float32)
    return hidden_states.new_empty(hidden_states.shape), grad_modulation


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    hidden_states, scale, shift, ctx.eps = inputs
    ctx.save_for_backward(hidden_states, scale)
    ctx.modulation = [(tensor.shape, tensor.dtype) for tensor in (scale, shift)]


def _backward(ctx: Any, grad: Tensor) -> tuple:
    grad_input, grad_modulation = _modulated_layer_norm_backward_triton(grad, *ctx.saved_tensors, ctx.eps)
    scale, shift = (
        value.sum_to_size(shape).to(dtype)
        for value, (shape, dtype) in zip(grad_modulation, ctx.modulation, strict=True)
    )
    return grad_input, scale, shift, None


@triton_operator(
    "modulated_layer_norm_forward(Tensor hidden_states, Tensor scale, Tensor shift, float eps) -> Tensor",
    autograd=(_setup_context, _backward),
)
def _modulated_layer_norm_triton(hidden_states: Tensor, *_: Any) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)
