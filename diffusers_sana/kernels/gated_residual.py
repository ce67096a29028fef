"""The gated residual connection of adaLN (DiT, arXiv 2212.09748).

    out = residual + gate * hidden_states

Computed in fp32 and rounded once.

Legend: B batch, N tokens, C channels.
"""

from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.dispatch import triton_operator, unsupported_modulation, use_triton


def gated_residual(residual: Tensor, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """Adds `gate * hidden_states` to `residual`.

    Args:
        residual, hidden_states: `[B, N, C]`, with any strides: channels-last images need no copy.
        gate: `[B or 1, 1, C]`, which may be a view; other broadcastable shapes run the reference.

    Returns:
        `[B, N, C]` in the dtype of `residual`.
    """
    reason = unsupported_modulation(hidden_states, gate)
    if reason is None and residual.shape != hidden_states.shape:
        reason = f"residual and hidden states differ in shape, {list(residual.shape)} and {list(hidden_states.shape)}"
    if use_triton("gated_residual", residual, hidden_states, gate, unsupported=reason):
        return _gated_residual_triton(residual, hidden_states, gate)
    return gated_residual_reference(residual, hidden_states, gate)


def gated_residual_reference(residual: Tensor, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """The formula in PyTorch; float64 inputs give the reference result."""
    # `addcmul` computes half precision in fp32 and rounds once; it promotes mixed dtypes.
    return torch.addcmul(residual, gate, hidden_states).to(residual.dtype)


@triton_operator("gated_residual_backward(Tensor grad, Tensor hidden_states, Tensor gate) -> (Tensor, Tensor)")
def _gated_residual_backward_triton(grad: Tensor, hidden_states: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, channels = hidden_states.shape
    grad_gate = hidden_states.new_empty((batch, 1, channels), dtype=torch.float32)
    return hidden_states.new_empty(hidden_states.shape), grad_gate


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, hidden_states, gate = inputs
    ctx.save_for_backward(hidden_states, gate)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    hidden_states, gate = ctx.saved_tensors
    grad_hidden_states, grad_gate = _gated_residual_backward_triton(grad, hidden_states, gate)
    # The gradient of the residual is that of the output; autograd copies it where it must.
    return grad, grad_hidden_states, grad_gate.sum_to_size(gate.shape).to(gate.dtype)


@triton_operator(
    "gated_residual_forward(Tensor residual, Tensor hidden_states, Tensor gate) -> Tensor",
    autograd=(_setup_context, _backward),
)
def _gated_residual_triton(residual: Tensor, *_: Any) -> Tensor:
    return residual.new_empty(residual.shape)
