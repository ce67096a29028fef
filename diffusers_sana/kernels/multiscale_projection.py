"""Depthwise k x k convolution, then a matrix per group of channels: a further scale of the attention tokens of DC-AE.

    d = depthwise_conv(x),  zero padding k // 2
    out[g] = W[g] d[g],     g the groups of G channels

Channels-last. Computed in fp32 and rounded once at the end (EfficientViT, arXiv 2205.14756).

Legend: B batch, h, w height and width, C channels, G channels per group.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from diffusers_sana.kernels.dispatch import triton_operator, use_triton


GROUP_SIZES = (16, 32, 64)  # sides of a matrix that tensor cores support and that fit into registers
MAX_KERNEL_SIZE = 5  # all taps of a thread's channels are in registers


def multiscale_projection(hidden_states: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> Tensor:
    """Depthwise convolution with zero padding, then a grouped 1x1 convolution; neither has a bias.

    Args:
        hidden_states: `[B, h, w, C]`.
        depthwise_weight: `[C, 1, k, k]`, k odd.
        pointwise_weight: `[C, G, 1, 1]`.

    Returns:
        `[B, h, w, C]` in the dtype of `hidden_states`.

    Raises:
        ValueError: the weights do not fit the channels, or k is even.
    """
    channels, kernel_size = hidden_states.shape[-1], depthwise_weight.shape[-1]
    group_size = pointwise_weight.shape[1]
    if depthwise_weight.shape != (channels, 1, kernel_size, kernel_size) or kernel_size % 2 == 0:
        raise ValueError(
            f"`depthwise_weight` must be [C, 1, k, k] with odd k for `hidden_states` [B, h, w, C], got "
            f"{tuple(depthwise_weight.shape)} for {tuple(hidden_states.shape)}. Images must be channels-last."
        )
    if pointwise_weight.shape != (channels, group_size, 1, 1) or channels % group_size:
        raise ValueError(
            f"`pointwise_weight` must be [C, G, 1, 1] with G a divisor of C = {channels}, got "
            f"{tuple(pointwise_weight.shape)}."
        )
    reason = None
    if group_size not in GROUP_SIZES:
        reason = f"groups of {group_size} channels, not one of {GROUP_SIZES}"
    elif kernel_size > MAX_KERNEL_SIZE:
        reason = f"a kernel size above {MAX_KERNEL_SIZE}, {kernel_size}"
    if use_triton("multiscale_projection", hidden_states, depthwise_weight, pointwise_weight, unsupported=reason):
        return _multiscale_projection_triton(hidden_states, depthwise_weight, pointwise_weight)
    return multiscale_projection_reference(hidden_states, depthwise_weight, pointwise_weight)


def multiscale_projection_reference(
    hidden_states: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor
) -> Tensor:
    """The formula in PyTorch; float64 inputs give the reference result."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    channels, group_size = pointwise_weight.shape[:2]
    # A permuted view: the convolutions see an image in `channels_last` and return one.
    out = F.conv2d(
        hidden_states.to(dtype).movedim(-1, 1),
        depthwise_weight.to(dtype),
        padding=depthwise_weight.shape[-1] // 2,
        groups=channels,
    )
    out = F.conv2d(out, pointwise_weight.to(dtype), groups=channels // group_size)
    return out.movedim(1, -1).to(hidden_states.dtype, memory_format=torch.contiguous_format)


def _grad_weights(
    grad: Tensor, hidden_states: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of both weights in PyTorch, because only the training of autoencoders needs them."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    groups = grad.shape[-1] // pointwise_weight.shape[1]
    pixels, grad = hidden_states.to(dtype).movedim(-1, 1), grad.to(dtype).movedim(-1, 1)
    depthwise, pointwise = depthwise_weight.to(dtype), pointwise_weight.to(dtype)
    padding = depthwise.shape[-1] // 2
    mixed = F.conv2d(pixels, depthwise, padding=padding, groups=pixels.shape[1])
    grad_pointwise = conv2d_weight(mixed, pointwise.shape, grad, groups=groups)
    grad = conv2d_input(mixed.shape, pointwise, grad, groups=groups)
    grad_depthwise = conv2d_weight(pixels, depthwise.shape, grad, padding=padding, groups=pixels.shape[1])
    return grad_depthwise.to(depthwise_weight.dtype), grad_pointwise.to(pointwise_weight.dtype)


@triton_operator(
    "multiscale_projection_backward(Tensor grad, Tensor depthwise_weight, Tensor pointwise_weight, ScalarType dtype)"
    " -> Tensor"
)
def _multiscale_projection_backward_triton(grad: Tensor, *weights_and_dtype: Any) -> Tensor:
    return grad.new_empty(grad.shape, dtype=weights_and_dtype[-1])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    hidden_states, *weights = ctx.saved_tensors
    grad_input = grad_depthwise = grad_pointwise = None
    if ctx.needs_input_grad[0]:
        grad_input = _multiscale_projection_backward_triton(grad, *weights, hidden_states.dtype)
    if any(ctx.needs_input_grad[1:]):
        grad_depthwise, grad_pointwise = _grad_weights(grad, hidden_states, *weights)
    return grad_input, grad_depthwise, grad_pointwise


@triton_operator(
    "multiscale_projection_forward(Tensor hidden_states, Tensor depthwise_weight, Tensor pointwise_weight) -> Tensor",
    autograd=(_setup_context, _backward),
)
def _multiscale_projection_triton(hidden_states: Tensor, *_: Any) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)
