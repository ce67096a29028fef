"""ReLU linear attention (Sana, arXiv 2410.10629, section 2.2; EfficientViT, arXiv 2205.14756).

    out_i = sum_j v_j (relu(k_j) . relu(q_i)) / (sum_j relu(k_j) . relu(q_i) + eps)

The sums over j do not depend on i, so one (head_dim + 1, head_dim) state per head serves all queries and the cost
is linear in the number of tokens. State, products and division are fp32 whatever the dtype of the inputs: sums over
thousands of tokens overflow fp16 and lose all small terms in bf16. An enclosing autocast changes nothing.

Legend: B batch, N tokens, H heads, D head_dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.dispatch import triton_operator, use_triton
from diffusers_sana.kernels.precision import without_autocast


MAX_HEAD_DIM = 64  # one program holds the state of a head and a block of rows
ReduceState = Callable[[Tensor], Tensor]


def relu_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    eps: float = 1e-15,
    reduce_state: ReduceState | None = None,
) -> Tensor:
    """Unmasked linear attention with the feature map `relu`.

    Args:
        query, key, value: `[B, N, H, D]`, any strides and floating dtype; `key` and `value` may have another N.
        eps: added to the denominator, in fp32 (1e-15 is zero in fp16).
        reduce_state: for keys and values that are distributed over processes: takes the states `[B, H, D + 1, D]` of
            this process, in fp32, which it may overwrite, and returns those of all. Has no gradient.

    Returns:
        `[B, N, H, D]` in the dtype of `value`, contiguous. Zero where no key and query share a positive entry.
    """
    reason = _unsupported_reason(query, key, value)
    if use_triton("relu_linear_attention", query, key, value, unsupported=reason):
        if reduce_state is None:
            return _relu_linear_attention_triton(query, key, value, eps)[0]
        state = reduce_state(_relu_linear_attention_state_triton(key, value))
        return _relu_linear_attention_apply_triton(query, state, value.dtype, eps)
    return relu_linear_attention_reference(query, key, value, eps=eps, reduce_state=reduce_state)


def _unsupported_reason(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernel does not support these shapes, or None if it does."""
    batch, _, heads, head_dim = query.shape
    if key.shape != value.shape or (key.shape[0], *key.shape[2:]) != (batch, heads, head_dim):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        return (
            f"query, key and value must agree in batch, heads and head_dim, and key and value in tokens, got {shapes}"
        )
    if head_dim > MAX_HEAD_DIM:
        return f"more than {MAX_HEAD_DIM} channels per head, {head_dim}"
    if query.numel() == 0 or key.numel() == 0:
        return "a tensor is empty"
    return None


def relu_linear_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-15, reduce_state: ReduceState | None = None
) -> Tensor:
    """The formula in PyTorch; float64 inputs give the reference result."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = F.relu(query).to(dtype).transpose(1, 2)  # [B, H, N, D]
    key = F.relu(key).to(dtype).transpose(1, 2)
    with without_autocast(query.device.type):
        state = torch.matmul(value.to(dtype).permute(0, 2, 3, 1), key)  # [B, H, D, D]: sum_j v_j k_j^T
        key_sum = key.sum(dim=-2, keepdim=True)  # [B, H, 1, D]
        if reduce_state is not None:
            state, key_sum = reduce_state(torch.cat([state, key_sum], dim=-2)).tensor_split([-1], dim=-2)
        numerator = torch.matmul(query, state.transpose(-1, -2))
        denominator = torch.matmul(query, key_sum.transpose(-1, -2))
    # Contiguous as [B, N, H, D], so that the caller merges heads without a copy.
    return (numerator / (denominator + eps)).transpose(1, 2).to(value.dtype).contiguous()


@triton_operator(
    "relu_linear_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor state, float eps)"
    " -> (Tensor, Tensor, Tensor)"
)
def _relu_linear_attention_backward_triton(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    query, key, value, _, _ = inputs
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, output[1])


def _backward(ctx: Any, grad: Tensor, grad_state: Any) -> tuple:
    return *_relu_linear_attention_backward_triton(grad, *ctx.saved_tensors, ctx.eps), None


def _empty_state(key: Tensor) -> Tensor:
    batch, _, heads, head_dim = key.shape
    return key.new_empty((batch, heads, head_dim + 1, head_dim), dtype=torch.float32)


# Returns the output and the states, which the backward pass needs.
@triton_operator(
    "relu_linear_attention_forward(Tensor query, Tensor key, Tensor value, float eps) -> (Tensor, Tensor)",
    autograd=(_setup_context, _backward),
)
def _relu_linear_attention_triton(query: Tensor, key: Tensor, value: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape, dtype=value.dtype), _empty_state(query)


@triton_operator("relu_linear_attention_state(Tensor key, Tensor value) -> Tensor")
def _relu_linear_attention_state_triton(key: Tensor, value: Tensor) -> Tensor:
    return _empty_state(key)


@triton_operator("relu_linear_attention_apply(Tensor query, Tensor state, ScalarType dtype, float eps) -> Tensor")
def _relu_linear_attention_apply_triton(query: Tensor, state: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    return query.new_empty(query.shape, dtype=dtype)
