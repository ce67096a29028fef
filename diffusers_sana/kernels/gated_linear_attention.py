"""Gated linear attention with rotary positions (SANA-Video 2.0, arXiv 2607.21553).

    out_i = sum_j v_j beta_j (R_j k_j . R_i q_i)  [/ (sum_j relu(k_j) . relu(q_i) + eps)]

R turns each pair of adjacent channels by an angle of the token (RoPE, arXiv 2104.09864), and beta is a gate per token
and head. Queries and keys have no feature map, so weights may be negative. Instead of a sum of weights, an RMS norm
after the operation fixes the scale of the output; the divisor, of the first public version, all but cancels there.

As in `relu_linear_attention`, the sums over j do not depend on i, so the cost is linear in the number of tokens, and
everything is fp32 whatever the dtype of the inputs.

The Triton kernels are those of `relu_linear_attention` with `rotary`. Since x = relu(x) - relu(-x), two passes over
the keys give the state, and two over the queries the output. A gate of a key may as well be one of its value. With a
sum of keys of zero and an eps of one, the kernels divide by one. They read queries and keys as they are, where PyTorch
makes rotated copies in fp32. They have no backward pass: where a gradient is needed, PyTorch's operations run.

Legend: B batch, N tokens, H heads, D head_dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.dispatch import use_triton
from diffusers_sana.kernels.precision import without_autocast
from diffusers_sana.kernels.relu_linear_attention import (
    ReduceState,
    Rotary,
    rotary_apply_triton,
    rotary_state_triton,
    rotate_pairs,
    unsupported_reason,
)


def gated_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    rotary: Rotary,
    *,
    divisor: bool = False,
    eps: float = 1e-8,
    reduce_state: ReduceState | None = None,
) -> Tensor:
    """Unmasked linear attention whose keys are gated, without a feature map.

    Args:
        query, key, value: `[B, N, H, D]`, any strides and floating dtype.
        beta: gates of the keys, `[B, N, H]`.
        rotary: cosines and sines `[N, D/2]` of the angles, in fp32, one for each pair of channels (2c, 2c + 1).
        divisor: divide by the sum of the unrotated, ungated ReLU weights.
        eps: added to the divisor, in fp32.
        reduce_state: see `relu_linear_attention`; the last row of a state is the sum of the keys' ReLUs.

    Returns:
        `[B, N, H, D]` in fp32 (float64 for float64 inputs), contiguous: sums over many tokens, which would overflow
        fp16 before they are normed.
    """
    inputs = query, key, value, beta
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        reason: str | None = "a gradient is needed"
    else:
        reason = unsupported_reason(query, key, value, rotary)
    if use_triton("gated_linear_attention", *inputs, *rotary, unsupported=reason):
        return _by_kernels(*inputs, rotary, divisor, eps, reduce_state)
    return gated_linear_attention_reference(*inputs, rotary, divisor=divisor, eps=eps, reduce_state=reduce_state)


def _by_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    rotary: Rotary,
    divisor: bool,
    eps: float,
    reduce_state: ReduceState | None,
) -> Tensor:
    """As `gated_linear_attention`."""
    gated = value.float() * beta.float().unsqueeze(-1)
    state = rotary_state_triton(key, gated, *rotary)  # [B, H, D + 1, D]; the last row is the sum of relu(k)
    state[:, :, :-1] -= rotary_state_triton(-key, gated, *rotary)[:, :, :-1]
    state = state if reduce_state is None else reduce_state(state)
    key_sum = state[:, :, -1:].clone()
    state[:, :, -1:] = 0
    out = rotary_apply_triton(query, state, *rotary, torch.float32, 1.0)
    out -= rotary_apply_triton(-query, state, *rotary, torch.float32, 1.0)
    if divisor:
        with without_autocast(query.device.type):
            total = torch.matmul(F.relu(query).float().transpose(1, 2), key_sum.mT)  # [B, H, N, 1]
        out = out / (total.transpose(1, 2) + eps)
    return out


def gated_linear_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    rotary: Rotary,
    *,
    divisor: bool = False,
    eps: float = 1e-8,
    reduce_state: ReduceState | None = None,
) -> Tensor:
    """The formula in PyTorch; float64 inputs give the reference result."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (x.to(dtype).transpose(1, 2) for x in (query, key, value))  # [B, H, N, D]
    gates = beta.to(dtype).mT.unsqueeze(-1)  # [B, H, N, 1]
    with without_autocast(query.device.type):
        state = torch.matmul((rotate_pairs(key, *rotary) * gates).mT, value)  # [B, H, D, D]: sum_j beta_j k_j v_j^T
        if divisor or reduce_state is not None:
            key_sum = F.relu(key).sum(dim=-2, keepdim=True)  # [B, H, 1, D]
        if reduce_state is not None:
            state, key_sum = reduce_state(torch.cat([state, key_sum], dim=-2)).tensor_split([-1], dim=-2)
        out = torch.matmul(rotate_pairs(query, *rotary), state)
        if divisor:
            out = out / (torch.matmul(F.relu(query), key_sum.mT) + eps)
    return out.transpose(1, 2).contiguous()
