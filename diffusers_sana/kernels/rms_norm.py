"""Root-mean-square norm over the last axis, with optional bias and residual.

    out = x / sqrt(mean(x^2) + eps) * weight [+ bias] [+ residual]

Everything is computed in fp32 and rounded once at the end: closer to fp32 than the three roundings of the stock
diffusers class.
"""

import torch
from torch import Tensor


def rms_norm(
    hidden_states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """RMS norm of the last axis of `hidden_states`.

    Args:
        hidden_states: `[..., C]`.
        weight, bias: `[C]`.
        residual: `[..., C]`, added after the norm.

    Returns:
        `[..., C]` in the dtype of `hidden_states`.
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    out = hidden_states.to(dtype)
    out = out * torch.rsqrt(out.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    if residual is not None:
        out = out + residual
    return out.to(hidden_states.dtype)
