"""A residual connection of adaLN and the modulated layer norm after it (DiT, arXiv 2212.09748), in one kernel.

    sum = residual + gate * hidden_states
    out = (sum - mean(sum)) / sqrt(var(sum) + eps) * (1 + scale) + shift

The sum is rounded before it is normalized, so the results are those of `gated_residual` and `modulated_layer_norm`.
One kernel saves a launch, and the second one would read the sum again.

Legend: B batch, N tokens, C channels.
"""

from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.dispatch import triton_operator, unsupported_modulation, use_triton
from diffusers_sana.kernels.gated_residual import gated_residual, gated_residual_reference
from diffusers_sana.kernels.modulated_layer_norm import (
    MAX_CHANNELS,
    modulated_layer_norm,
    modulated_layer_norm_reference,
)


def gated_residual_norm(
    residual: Tensor, hidden_states: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Adds `gate * hidden_states` to `residual` and normalizes the sum, scaled by `1 + scale` and shifted.

    Where a gradient is required, these are two operations, which have one.

    Args:
        residual, hidden_states: `[B, N, C]`; fastest if contiguous.
        gate: `[B or 1, 1, C]`, which may be a view; None for a gate of ones.
        scale, shift: likewise, never None. Other broadcastable shapes of the three run the reference.
        eps: added to the variance.

    Returns:
        The sum and its norm, `[B, N, C]` in the dtype of `residual`.
    """
    tensors = (residual, hidden_states, gate, scale, shift)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        total = _sum(residual, hidden_states) if gate is None else gated_residual(residual, hidden_states, gate)
        return total, modulated_layer_norm(total, scale, shift, eps=eps)
    reason = unsupported_modulation(hidden_states, scale, shift, *(() if gate is None else (gate,)))
    if reason is None and residual.shape != hidden_states.shape:
        reason = f"residual and hidden states differ in shape, {list(residual.shape)} and {list(hidden_states.shape)}"
    if reason is None and residual.shape[-1] > MAX_CHANNELS:
        reason = f"more than {MAX_CHANNELS} channels, {residual.shape[-1]}"
    if use_triton("gated_residual_norm", *tensors, unsupported=reason):
        return _gated_residual_norm_triton(*tensors, eps)
    return gated_residual_norm_reference(*tensors, eps=eps)


def gated_residual_norm_reference(
    residual: Tensor, hidden_states: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The formulas in PyTorch; float64 inputs give the reference result."""
    total = _sum(residual, hidden_states) if gate is None else gated_residual_reference(residual, hidden_states, gate)
    return total, modulated_layer_norm_reference(total, scale, shift, eps=eps)


def _sum(residual: Tensor, hidden_states: Tensor) -> Tensor:
    return (residual + hidden_states).to(residual.dtype)


@triton_operator(
    "gated_residual_norm_forward(Tensor residual, Tensor hidden_states, Tensor? gate, Tensor scale, Tensor shift, "
    "float eps) -> (Tensor, Tensor)"
)
def _gated_residual_norm_triton(residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)
