"""Layers shared by the models: subclasses of stock layers that call our operations.

Adapters, quantizers and offloading hooks see `nn.Linear` and `nn.Conv2d` with their usual weights and names, and may
wrap or replace them. `is_plain` tells whether that happened, so that a model can fuse several layers into one
operation. `hooks_of` and `scaled_adapters` handle what diffusers and PEFT attach to the layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.utils import scale_lora_layers
from torch import Tensor, nn

from diffusers_sana.kernels.glu_depthwise_conv import glu_depthwise_conv
from diffusers_sana.kernels.glu_mb_conv import glu_mb_conv
from diffusers_sana.kernels.linear import conv2d, linear


Pair = tuple[int, int]


class Linear(nn.Linear):
    """`nn.Linear`, also fast in half precision on processors without such instructions (`kernels/precision.py`)."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return linear(input, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with zero padding, also fast in half precision on processors without such instructions."""

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C', H', W']`; fastest if channels-last in memory; the output then is too."""
        stride, padding = cast(Pair, self.stride), cast(Pair, self.padding)
        return conv2d(input, self.weight, self.bias, stride=stride, padding=padding, groups=self.groups)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution as a matrix product over channels-last pixels, without layout conversion or copy."""

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C', H, W]`, channels-last in memory."""
        return linear(input.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class PatchConv3d(nn.Conv3d):
    """A convolution whose stride is its kernel, without padding, as a matrix product over patches."""

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, T, H, W]` to `[B, C', T/p, H/q, W/r]`, channels-last in memory."""
        p, q, r = self.kernel_size
        patches = input.unflatten(4, (-1, r)).unflatten(3, (-1, q)).unflatten(2, (-1, p))
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # [B, T/p, H/q, W/r, C * p * q * r]
        return linear(patches, self.weight.flatten(1), self.bias).movedim(-1, 1)


def is_plain(*layers: nn.Module) -> bool:
    """Whether all layers are of this file or stock layer norms, and unmodified: no hooks, no patched `forward`."""
    return all(
        type(layer) in (Linear, Conv2d, PointwiseConv2d, nn.LayerNorm)
        and not is_patched(layer)
        and not layer._forward_pre_hooks
        and not layer._forward_hooks
        and not layer._backward_pre_hooks
        and not layer._backward_hooks
        for layer in layers
    )


def is_patched(module: nn.Module) -> bool:
    """Whether the instance has a `forward` of its own; diffusers' hooks leave that of the class there when they go."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def hooks_of(module: nn.Module) -> Mapping[str, Any]:
    """The hooks of diffusers on a module, by name. Unlike diffusers' own functions, adds nothing to the module."""
    registry = getattr(module, "_diffusers_hook", None)
    return {} if registry is None else registry.hooks


@contextmanager
def scaled_adapters(model: nn.Module | None, scale: float | None) -> Iterator[None]:
    """Multiplies the scales of the adapters in `model` by `scale` within the block.

    Afterwards the scales are restored exactly. `unscale_lora_layers` of diffusers divides, which rounds, and sets them
    to 1 after a scale of 0.
    """
    if model is None or scale is None or scale == 1.0:
        yield
        return
    layers: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    scales = [dict(layer.scaling) for layer in layers]
    try:
        scale_lora_layers(model, scale)
        yield
    finally:
        for layer, before in zip(layers, scales, strict=True):
            layer.scaling.update(before)


def split_scale(attention_kwargs: dict[str, Any] | None) -> tuple[float | None, dict[str, Any]]:
    """The entry `scale` of `attention_kwargs`, for `scaled_adapters`, and the other entries."""
    others = dict(attention_kwargs or {})
    return others.pop("scale", None), others


def gated_bottleneck(
    hidden_states: Tensor, conv_inverted: nn.Conv2d, conv_depth: nn.Conv2d, conv_point: nn.Conv2d
) -> Tensor:
    """`glu_mb_conv` of three layers, `[B, C, H, W]` to `[B, C', H, W]`; layer by layer if they are not plain.

    With quantized or adapted 1x1 convolutions the depthwise convolution and the gate are still one operation.
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


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scaling + mask) v with the softmax in fp32, in the form of transformers' attention functions.

    Args:
        module: its mode says whether `dropout` applies.
        query, key, value: `[B, heads, N, d]`.
        attention_mask: added to the scores; broadcastable to `[B, heads, N, N]`.
        scaling: factor of the scores.
        dropout: probability, on the weights.

    Returns:
        `[B, N, heads, d]`, and the weights before dropout `[B, heads, N, N]`.
    """
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = nn.functional.dropout(weights, dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights
