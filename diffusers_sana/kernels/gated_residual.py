"""What a block adds to the residual stream, times the gate of adaLN (DiT, arXiv 2212.09748).

    out = residual + gate * hidden_states

Computed in fp32 and rounded once.

Legend: B batch, N tokens, C channels.
"""

from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.dispatch import use_triton
from diffusers_sana.kernels.modulated_layer_norm import modulation_refusal


def gated_residual(residual: Tensor, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """Adds `gate * hidden_states` to `residual`.

    Args:
        residual, hidden_states: `[B, N, C]`, of any strides: tokens seen as an image need no copy.
        gate: `[B or 1, 1, C]`, which may be a view; other shapes that broadcast run the reference.

    Returns:
        `[B, N, C]` in the dtype of `residual`.
    """
    unless = modulation_refusal(hidden_states, gate)
    if unless is None and residual.shape != hidden_states.shape:
        unless = f"residual and hidden states differ in shape, {list(residual.shape)} and {list(hidden_states.shape)}"
    if use_triton("gated_residual", residual, hidden_states, gate, unless=unless):
        return _gated_residual_triton(residual, hidden_states, gate)
    return gated_residual_reference(residual, hidden_states, gate)


def gated_residual_reference(residual: Tensor, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """The formula in PyTorch; float64 inputs give the gold standard."""
    # Of half precision, `addcmul` computes in fp32 and rounds once; mixed dtypes it promotes, to fp32 where one is.
    return torch.addcmul(residual, gate, hidden_states).to(residual.dtype)


@torch.library.custom_op("diffusers_sana::gated_residual", mutates_args=())
def _gated_residual_triton(residual: Tensor, hidden_states: Tensor, gate: Tensor) -> Tensor:
    from diffusers_sana.kernels.triton.gated_residual import gated_residual_forward

    return gated_residual_forward(residual, hidden_states, gate)


@_gated_residual_triton.register_fake
def _(residual: Tensor, hidden_states: Tensor, gate: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


@torch.library.custom_op("diffusers_sana::gated_residual_backward", mutates_args=())
def _gated_residual_backward_triton(grad: Tensor, hidden_states: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    from diffusers_sana.kernels.triton.gated_residual import gated_residual_backward

    return gated_residual_backward(grad, hidden_states, gate)


@_gated_residual_backward_triton.register_fake
def _(grad: Tensor, hidden_states: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
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


_gated_residual_triton.register_autograd(_backward, setup_context=_setup_context)
