"""The gated inverted bottleneck of Sana's Mix-FFN (arXiv 2410.10629, section 2.2) and of DC-AE (arXiv 2410.10733).

    out = project(gate(depthwise_conv3x3(silu(expand(x)))))

`expand` and `project` are matrix products over the channels of each pixel, and `gate` multiplies the first half of the
channels by SiLU of the second. See `glu_depthwise_conv` for the middle.

On a CPU the hidden channels go through in groups, which the depthwise middle does not mix: each group stays in the
cache between the two products, and the hidden image never exists as a whole. The products of the groups are summed in
fp32.

Legend: B batch, h, w height and width, D channels in, F hidden channels after the gate, E channels out.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.glu_depthwise_conv import glu_depthwise_conv
from diffusers_sana.kernels.linear import linear
from diffusers_sana.kernels.precision import arithmetic_dtype, is_inference


GROUP = 2**21  # elements of one half of the hidden image computed at a time: 8 MiB of fp32
MIN_CHANNELS, MAX_CHANNELS = 256, 1024  # narrower products are inefficient; wider groups leave the cache
LARGE_HALF = 2**24  # elements of a hidden image from which half precision goes in groups too, to save memory


def glu_mb_conv(
    hidden_states: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
) -> Tensor:
    """Expansion, depthwise 3x3 convolution, gate, projection.

    Args:
        hidden_states: `[B, h, w, D]`.
        expand_weight: `[2F, D]` and its bias `[2F]`.
        depthwise_weight: `[2F, 1, 3, 3]` and its bias `[2F]`.
        project_weight: `[E, F]`.

    Returns:
        `[B, h, w, E]` in the dtype of `hidden_states`.
    """
    weights = (expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight)
    if hidden_states.device.type == "cpu" and is_inference(hidden_states, *weights):
        is_large = hidden_states[..., 0].numel() * expand_weight.shape[0] >= LARGE_HALF
        in_fp32 = arithmetic_dtype(hidden_states) in (torch.float32, torch.float64)
        if (in_fp32 or is_large) and not torch.is_autocast_enabled("cpu"):
            return _glu_mb_conv_in_groups(hidden_states, *weights)
    hidden = linear(hidden_states, expand_weight, expand_bias)  # [B, h, w, 2F]
    return linear(glu_depthwise_conv(hidden, depthwise_weight, depthwise_bias), project_weight)


def _glu_mb_conv_in_groups(
    hidden_states: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
) -> Tensor:
    dtype = arithmetic_dtype(hidden_states)
    inputs = hidden_states.to(dtype)
    features = project_weight.shape[1]

    def convolve(first: int, last: int) -> Tensor:
        """Hidden channels `[first, last)` before the gate, `[B, last - first, h, w]`, channels-last."""
        group = slice(first, last)
        hidden = F.linear(inputs, expand_weight[group].to(dtype), _piece(expand_bias, group, dtype))
        hidden = F.silu(hidden, inplace=True).movedim(-1, 1)
        weight, bias = depthwise_weight[group].to(dtype), _piece(depthwise_bias, group, dtype)
        return F.conv2d(hidden, weight, bias, padding=1, groups=last - first)

    num_pixels = math.prod(hidden_states.shape[:3])
    width = min(max(GROUP // num_pixels, MIN_CHANNELS), MAX_CHANNELS)
    num_groups = math.ceil(features / width)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    out = torch.zeros(num_pixels, project_weight.shape[0], dtype=sum_dtype)
    for i in range(num_groups):
        first, last = i * features // num_groups, (i + 1) * features // num_groups
        gate = F.silu(convolve(features + first, features + last), inplace=True)
        gated = gate.mul_(convolve(first, last)).movedim(1, -1).reshape(num_pixels, -1)
        weight = project_weight[:, first:last].to(dtype).t()
        if sum_dtype == dtype:
            out.addmm_(gated, weight)
        else:
            out.add_(gated @ weight)
    return out.view(*hidden_states.shape[:3], -1).to(hidden_states.dtype)


def _piece(bias: Tensor | None, group: slice, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[group].to(dtype)
