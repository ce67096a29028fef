"""SiLU, depthwise 3x3 convolution and SiLU gate: the middle of Sana's Mix-FFN and of DC-AE's GLUMBConv.

    y = depthwise_conv3x3(silu(x)) + bias,  zero padding 1
    out = y[:F] * silu(y[F:])

Channels-last. Everything is computed in fp32 and rounded once at the end. The SiLU of the input is part of the
operation, so the intermediate 2F channels are never written to memory.

Legend: B batch, h, w height and width, F channels of the output, half of the input's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.dispatch import triton_operator, use_triton


def glu_depthwise_conv(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU, depthwise 3x3 convolution with zero padding, then the first half of the channels gated by the second.

    Args:
        hidden_states: `[B, h, w, 2F]`.
        weight: `[2F, 1, 3, 3]`.
        bias: `[2F]`.

    Returns:
        `[B, h, w, F]` in the dtype of `hidden_states`.

    Raises:
        ValueError: an odd number of channels, or a weight for another number.
    """
    channels = hidden_states.shape[-1]
    if channels % 2 or weight.shape != (channels, 1, 3, 3):
        raise ValueError(
            f"`weight` must be [2F, 1, 3, 3] for `hidden_states` [B, h, w, 2F], got {tuple(weight.shape)} for "
            f"{tuple(hidden_states.shape)}. Images must be channels-last."
        )
    if use_triton("glu_depthwise_conv", hidden_states, weight, bias):
        return _glu_depthwise_conv_triton(hidden_states, weight, bias)
    return glu_depthwise_conv_reference(hidden_states, weight, bias)


def glu_depthwise_conv_reference(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The formula in PyTorch; float64 inputs give the reference result."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    out = F.silu(hidden_states.to(dtype), inplace=dtype != hidden_states.dtype)
    # A permuted view: the convolution sees an image in `channels_last` and returns one.
    out = F.conv2d(
        out.movedim(-1, 1),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        padding=1,
        groups=weight.shape[0],
    ).movedim(1, -1)
    features = weight.shape[0] // 2
    return F.silu(out[..., features:]).mul_(out[..., :features]).to(hidden_states.dtype)


@triton_operator(
    "glu_depthwise_conv_backward(Tensor grad, Tensor hidden_states, Tensor weight, Tensor? bias) -> (Tensor, Tensor)"
)
def _glu_depthwise_conv_backward_triton(grad: Tensor, hidden_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    grad_parameters = hidden_states.new_empty((10, hidden_states.shape[-1]), dtype=torch.float32)
    return hidden_states.new_empty(hidden_states.shape), grad_parameters


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    _, weight, bias = ctx.saved_tensors
    grad_input, grad_parameters = _glu_depthwise_conv_backward_triton(grad, *ctx.saved_tensors)
    grad_weight = grad_parameters[:9].t().reshape(weight.shape).to(weight.dtype)
    return grad_input, grad_weight, None if bias is None else grad_parameters[9].to(bias.dtype)


@triton_operator(
    "glu_depthwise_conv_forward(Tensor hidden_states, Tensor weight, Tensor? bias) -> Tensor",
    autograd=(_setup_context, _backward),
)
def _glu_depthwise_conv_triton(hidden_states: Tensor, *_: Any) -> Tensor:
    return hidden_states.new_empty((*hidden_states.shape[:-1], hidden_states.shape[-1] // 2))
