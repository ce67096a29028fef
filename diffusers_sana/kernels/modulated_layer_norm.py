"""Layer norm without parameters, then the affine modulation of adaLN (DiT, arXiv 2212.09748).

    out = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift

Computed in fp32 and rounded once.

Legend: B batch, N tokens, C channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.dispatch import use_triton


MAX_CHANNELS = 4096  # a row, its gradient and the modulation must fit into the registers of one program


def modulated_layer_norm(hidden_states: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Layer norm of the last axis, scaled by `1 + scale` and shifted.

    Args:
        hidden_states: `[B, N, C]`.
        scale, shift: `[B or 1, 1, C]`, which may be views; other shapes that broadcast run the reference.

    Returns:
        `[B, N, C]` in the dtype of `hidden_states`.
    """
    channels = hidden_states.shape[-1]
    unless = modulation_refusal(hidden_states, scale, shift)
    if unless is None and channels > MAX_CHANNELS:
        unless = f"more than {MAX_CHANNELS} channels, {channels}"
    if use_triton("modulated_layer_norm", hidden_states, scale, shift, unless=unless):
        return _modulated_layer_norm_triton(hidden_states, scale, shift, eps)
    return modulated_layer_norm_reference(hidden_states, scale, shift, eps=eps)


def modulated_layer_norm_reference(
    hidden_states: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """The formula in PyTorch; float64 inputs give the gold standard."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    out = F.layer_norm(hidden_states.to(dtype), hidden_states.shape[-1:], eps=eps)
    return torch.addcmul(shift.to(dtype), out, 1 + scale.to(dtype)).to(hidden_states.dtype)


def modulation_refusal(hidden_states: Tensor, *modulation: Tensor) -> str | None:
    """Why kernels cannot take tensors that are not `[B or 1, 1, C]` beside `hidden_states` `[B, N, C]`, or None."""
    if hidden_states.ndim == 3 and hidden_states.numel() > 0:
        batch, _, channels = hidden_states.shape
        if all(tensor.shape in ((batch, 1, channels), (1, 1, channels)) for tensor in modulation):
            return None
    shapes = [list(tensor.shape) for tensor in modulation]
    return f"it takes [B, N, C] with a modulation [B or 1, 1, C], got {list(hidden_states.shape)} with {shapes}"


@torch.library.custom_op("diffusers_sana::modulated_layer_norm", mutates_args=())
def _modulated_layer_norm_triton(hidden_states: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    from diffusers_sana.kernels.triton.modulated_layer_norm import modulated_layer_norm_forward

    return modulated_layer_norm_forward(hidden_states, scale, shift, eps)


@_modulated_layer_norm_triton.register_fake
def _(hidden_states: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


@torch.library.custom_op("diffusers_sana::modulated_layer_norm_backward", mutates_args=())
def _modulated_layer_norm_backward_triton(
    grad: Tensor, hidden_states: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from diffusers_sana.kernels.triton.modulated_layer_norm import modulated_layer_norm_backward

    return modulated_layer_norm_backward(grad, hidden_states, scale, eps)


@_modulated_layer_norm_backward_triton.register_fake
def _(grad: Tensor, hidden_states: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    batch, _, channels = hidden_states.shape
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


_modulated_layer_norm_triton.register_autograd(_backward, setup_context=_setup_context)
