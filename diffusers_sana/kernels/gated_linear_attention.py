"""Gated linear attention with rotary positions (SANA-Video 2.0, arXiv 2607.21553).

    out_i = sum_j v_j beta_j (R_j k_j . R_i q_i)  [/ (sum_j relu(k_j) . relu(q_i) + eps)]

R turns each pair of adjacent channels by an angle of the token (RoPE, arXiv 2104.09864), and beta is a gate per token
and head. Queries and keys have no feature map, so weights may be negative. Instead of a sum of weights, an RMS norm
after the operation fixes the scale of the output; the divisor, of the first public version, all but cancels there.

As in `relu_linear_attention`, the sums over j do not depend on i, so the cost is linear in the number of tokens, and
everything is fp32 whatever the dtype of the inputs.

Legend: B batch, N tokens, H heads, D head_dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.precision import without_autocast
from diffusers_sana.kernels.relu_linear_attention import Rotary, rotate_pairs


def gated_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    rotary: Rotary,
    *,
    divisor: bool = False,
    eps: float = 1e-8,
) -> Tensor:
    """Unmasked linear attention whose keys are gated, without a feature map.

    Args:
        query, key, value: `[B, N, H, D]`, any strides and floating dtype.
        beta: gates of the keys, `[B, N, H]`.
        rotary: cosines and sines `[N, D/2]` of the angles, in fp32, one for each pair of channels (2c, 2c + 1).
        divisor: divide by the sum of the unrotated, ungated ReLU weights.
        eps: added to the divisor, in fp32.

    Returns:
        `[B, N, H, D]` in fp32 (float64 for float64 inputs), contiguous: sums over many tokens, which would overflow
        fp16 before they are normed.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (x.to(dtype).transpose(1, 2) for x in (query, key, value))  # [B, H, N, D]
    gates = beta.to(dtype).mT.unsqueeze(-1)  # [B, H, N, 1]
    with without_autocast(query.device.type):
        state = torch.matmul((rotate_pairs(key, *rotary) * gates).mT, value)  # [B, H, D, D]: sum_j beta_j k_j v_j^T
        out = torch.matmul(rotate_pairs(query, *rotary), state)
        if divisor:
            out = out / (torch.matmul(F.relu(query), F.relu(key).sum(dim=-2).unsqueeze(-1)) + eps)
    return out.transpose(1, 2).contiguous()
