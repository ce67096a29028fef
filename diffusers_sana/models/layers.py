"""Layers that the models share: stock layers to everything that looks for one, with our operations inside.

Adapters, quantizers and offloading hooks find `nn.Linear` and `nn.Conv2d`, with their weights and names, and may wrap
or replace them. `is_plain` tells whether one has, so that a model may join several layers into one operation.
"""

from typing import cast

from torch import Tensor, nn

from diffusers_sana.kernels.glu_depthwise_conv import glu_depthwise_conv
from diffusers_sana.kernels.glu_mb_conv import glu_mb_conv
from diffusers_sana.kernels.linear import conv2d, linear


Pair = tuple[int, int]


class Linear(nn.Linear):
    """`nn.Linear`, fast in half precision also on processors that have none (see `kernels/precision.py`)."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return linear(input, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with zero padding, fast in half precision also on processors that have none."""

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C', H', W']`; best when channels-last in memory, and then so is the output."""
        stride, padding = cast(Pair, self.stride), cast(Pair, self.padding)
        return conv2d(input, self.weight, self.bias, stride=stride, padding=padding, groups=self.groups)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution run as a matrix product over channels-last pixels: no layout conversion, no copy."""

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C', H, W]`, channels-last in memory."""
        return linear(input.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


def is_plain(*layers: nn.Module) -> bool:
    """Whether all are layers of this file, neither replaced, nor hooked, nor with a `forward` of somebody else."""
    return all(
        type(layer) in (Linear, Conv2d, PointwiseConv2d)
        and "forward" not in layer.__dict__
        and not layer._forward_pre_hooks
        and not layer._forward_hooks
        for layer in layers
    )


def gated_bottleneck(
    hidden_states: Tensor, conv_inverted: nn.Conv2d, conv_depth: nn.Conv2d, conv_point: nn.Conv2d
) -> Tensor:
    """`glu_mb_conv` over three layers, `[B, C, H, W]` to `[B, C', H, W]`; one by one where they are not plain.

    With quantized or adapted 1x1 convolutions the middle is still one operation.
    """
    if is_plain(conv_inverted, conv_depth, conv_point):
        out = glu_mb_conv(
            hidden_states.movedim(1, -1),
            conv_inverted.weight.flatten(1),
            conv_inverted.bias,
            conv_depth.weight,
            conv_depth.bias,
            conv_point.weight.flatten(1),
        )
        return out.movedim(-1, 1)
    hidden = conv_inverted(hidden_states)
    if is_plain(conv_depth):
        gated = glu_depthwise_conv(hidden.movedim(1, -1), conv_depth.weight, conv_depth.bias).movedim(-1, 1)
    else:
        out, gate = conv_depth(nn.functional.silu(hidden)).chunk(2, dim=1)
        gated = out * nn.functional.silu(gate)
    return conv_point(gated)
