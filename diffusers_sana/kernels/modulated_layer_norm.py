"""Layer norm without parameters, then the affine modulation of adaLN (DiT, arXiv 2212.09748).

    out = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift

Computed in fp32 and rounded once.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def modulated_layer_norm(hidden_states: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Layer norm of the last axis, scaled by `1 + scale` and shifted.

    Args:
        hidden_states: `[B, N, C]`.
        scale, shift: broadcastable to it, e.g. `[B, 1, C]`.

    Returns:
        `[B, N, C]` in the dtype of `hidden_states`.
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    out = F.layer_norm(hidden_states.to(dtype), hidden_states.shape[-1:], eps=eps)
    return torch.addcmul(shift.to(dtype), out, 1 + scale.to(dtype)).to(hidden_states.dtype)
