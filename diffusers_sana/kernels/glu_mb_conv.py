"""The gated inverted bottleneck of Sana's Mix-FFN (arXiv 2410.10629, section 2.2) and of DC-AE (arXiv 2410.10733).

    out = project(gate(depthwise_conv3x3(silu(expand(x)))))

`expand` and `project` are matrix products over the channels of each pixel, and `gate` multiplies the first half of the
channels by SiLU of the second. See `glu_depthwise_conv` for the middle.

On a CPU the hidden channels are computed in groups that stay in the cache, see `cpu/blocked.py`.

Legend: B batch, h, w height and width, D channels in, F hidden channels after the gate, E channels out.
"""

import torch
from torch import Tensor

from diffusers_sana.kernels.cpu import blocked
from diffusers_sana.kernels.glu_depthwise_conv import glu_depthwise_conv
from diffusers_sana.kernels.linear import linear
from diffusers_sana.kernels.precision import arithmetic_dtype, is_inference


LARGE_IMAGE = 2**24  # elements of a hidden image above which half precision is computed in groups too, to save memory


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
        is_large = hidden_states[..., 0].numel() * expand_weight.shape[0] >= LARGE_IMAGE
        in_fp32 = arithmetic_dtype(hidden_states) in (torch.float32, torch.float64)
        if (in_fp32 or is_large) and not torch.is_autocast_enabled("cpu"):
            expand, depthwise = (expand_weight, expand_bias), (depthwise_weight, depthwise_bias)
            return blocked.glu_mb_conv(hidden_states, expand, depthwise, project_weight)
    hidden = linear(hidden_states, expand_weight, expand_bias)  # [B, h, w, 2F]
    return linear(glu_depthwise_conv(hidden, depthwise_weight, depthwise_bias), project_weight)
