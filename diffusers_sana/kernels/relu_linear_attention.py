"""ReLU linear attention (Sana, arXiv 2410.10629, section 2.2; EfficientViT, arXiv 2205.14756).

    out_i = sum_j v_j (relu(k_j) . relu(q_i)) / (sum_j relu(k_j) . relu(q_i) + eps)

The sums over j do not depend on i, so one (head_dim + 1, head_dim) state per head serves all queries and the cost
is linear in the number of tokens. State, products and division are fp32 whatever the dtype of the inputs: sums over
thousands of tokens overflow fp16 and lose all small terms in bf16. An enclosing autocast changes nothing.

With rotary positions (SANA-Video, arXiv 2509.24695; RoPE, arXiv 2104.09864) the weights of the numerator become
R_j relu(k_j) . R_i relu(q_i), where R turns each pair of adjacent channels by an angle of the token. The denominator
is not rotated, so it stays positive; weights may be negative, and those of a query do not add up to 1.

A state is a sum over tokens. So blocks of tokens that follow each other, each of which attends to itself and to all
before it (LongSANA, arXiv 2509.24695), need nothing of the past but its state: `block_causal_linear_attention`.

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
MAX_ROTARY_HEAD_DIM = 128  # one program holds the state for 64 channels of the values
ReduceState = Callable[[Tensor], Tensor]
Rotary = tuple[Tensor, Tensor]


def relu_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    eps: float = 1e-15,
    reduce_state: ReduceState | None = None,
    rotary: Rotary | None = None,
) -> Tensor:
    """Unmasked linear attention with the feature map `relu`.

    Args:
        query, key, value: `[B, N, H, D]`, any strides and floating dtype; `key` and `value` may have another N.
        eps: added to the denominator, in fp32 (1e-15 is zero in fp16).
        reduce_state: for keys and values of which these are a part: takes their states `[B, H, D + 1, D]` in fp32,
            which it may overwrite, and returns those of all. Rows are channels of the keys, columns of the values,
            and the last row is the sum of the keys. Has no gradient.
        rotary: cosines and sines `[N, D/2]` of the angles, in fp32, one for each pair of channels (2c, 2c + 1) of
            queries and keys. Has no gradient.

    Returns:
        `[B, N, H, D]` in the dtype of `value`, contiguous. Zero where no key and query share a positive entry.
    """
    reason = unsupported_reason(query, key, value, rotary)
    if use_triton("relu_linear_attention", query, key, value, *(rotary or ()), unsupported=reason):
        if rotary is not None:
            return _rotary(query, key, value, *rotary, eps, reduce_state)
        if reduce_state is None:
            return _relu_linear_attention_triton(query, key, value, eps)[0]
        state = reduce_state(_relu_linear_attention_state_triton(key, value))
        return _relu_linear_attention_apply_triton(query, state, value.dtype, eps)
    return relu_linear_attention_reference(query, key, value, eps=eps, reduce_state=reduce_state, rotary=rotary)


def block_causal_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: Tensor | None,
    *,
    eps: float = 1e-15,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """`relu_linear_attention` of a block of tokens to itself and to all blocks before it.

    Args:
        query, key, value, eps, rotary: of the block, as there; the angles of `rotary` go on from block to block.
        past: the state of all tokens before, `[B, H, D + 1, D]` in fp32; None for the first block.

    Returns:
        The output, as there, and the state of all tokens so far, for the next block. Neither has a gradient.
    """
    states = []

    def with_past(own: Tensor) -> Tensor:
        states.append(own if past is None else own + past)
        return states[0]

    out = relu_linear_attention(query, key, value, eps=eps, reduce_state=with_past, rotary=rotary)
    return out, states[0]


def unsupported_reason(query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None) -> str | None:
    """Why the kernel does not support these shapes, or None if it does."""
    batch, _, heads, head_dim = query.shape
    if key.shape != value.shape or (key.shape[0], *key.shape[2:]) != (batch, heads, head_dim):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        return (
            f"query, key and value must agree in batch, heads and head_dim, and key and value in tokens, got {shapes}"
        )
    max_head_dim = MAX_HEAD_DIM if rotary is None else MAX_ROTARY_HEAD_DIM
    if head_dim > max_head_dim:
        return f"more than {max_head_dim} channels per head, {head_dim}"
    if rotary is not None and any(table.dtype != torch.float32 for table in rotary):
        return f"the tables of `rotary` must be fp32, got {[table.dtype for table in rotary]}"
    if query.numel() == 0 or key.numel() == 0:
        return "a tensor is empty"
    return None


def relu_linear_attention_reference(
    query: Tensor, key: Tensor, value: Tensor,
    *, eps: float = 1e-15, reduce_state: ReduceState | None = None, rotary: Rotary | None = None,
) -> Tensor:  # fmt: skip
    """The formula in PyTorch; float64 inputs give the reference result."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = (F.relu(x).to(dtype).transpose(1, 2) for x in (query, key))  # [B, H, N, D]
    turned_query, turned_key = (x if rotary is None else rotate_pairs(x, *rotary) for x in (query, key))
    with without_autocast(query.device.type):
        state = torch.matmul(value.to(dtype).permute(0, 2, 3, 1), turned_key)  # [B, H, D, D]: sum_j v_j k_j^T
        key_sum = key.sum(dim=-2, keepdim=True)  # [B, H, 1, D]
        if reduce_state is not None:
            state, key_sum = reduce_state(torch.cat([state.mT, key_sum], dim=-2)).tensor_split([-1], dim=-2)
            state = state.mT
        numerator = torch.matmul(turned_query, state.transpose(-1, -2))
        denominator = torch.matmul(query, key_sum.transpose(-1, -2))
    # Contiguous as [B, N, H, D], so that the caller merges heads without a copy.
    return (numerator / (denominator + eps)).transpose(1, 2).to(value.dtype).contiguous()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channels (2c, 2c + 1) of `[..., N, D]` by angles whose cosines and sines are `[N, D/2]`."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


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


def _rotary(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, eps: float, reduce_state: ReduceState | None
) -> Tensor:
    """The kernels with rotary positions."""
    if reduce_state is None:
        return _rotary_triton(query, key, value, cos, sin, eps)[0]
    state = reduce_state(rotary_state_triton(key, value, cos, sin))
    return rotary_apply_triton(query, state, cos, sin, value.dtype, eps)


def _setup_rotary_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _rotary_backward(ctx: Any, grad: Tensor, grad_state: Any) -> tuple:
    """In PyTorch: the products are those of matrices, and training on videos spends its time elsewhere."""
    *inputs, cos, sin, state = ctx.saved_tensors
    query, key, value, grad = (x.float().transpose(1, 2) for x in (*inputs, grad))  # [B, H, N, D]
    is_query, is_key = query > 0, key > 0
    query, key = query.relu(), key.relu()
    turned_query, turned_key = (rotate_pairs(x, cos, sin) for x in (query, key))
    state, key_sum = state.tensor_split([-1], dim=-2)  # of key and value; [B, H, 1, D]
    with without_autocast(query.device.type):
        total = query @ key_sum.mT
        # A query that attends to nothing has its positive entries where no key has any: it moves no gradient.
        inverse = torch.where(total == 0, 0.0, 1 / (total + ctx.eps))
        grad = grad * inverse
        grad_turned = grad @ state.mT
        grad_total = -(turned_query * grad_turned).sum(dim=-1, keepdim=True) * inverse
        grad_query = rotate_pairs(grad_turned, cos, -sin) + grad_total * key_sum
        grad_state = turned_query.mT @ grad
        grad_key = rotate_pairs(value @ grad_state.mT, cos, -sin) + (grad_total * query).sum(dim=-2, keepdim=True)
        grad_value = turned_key @ grad_state
    grads = (grad_query * is_query, grad_key * is_key, grad_value)
    return *(x.transpose(1, 2).to(leaf.dtype) for x, leaf in zip(grads, inputs, strict=True)), None, None, None


@triton_operator(
    "relu_linear_attention_rotary_forward(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, float eps)"
    " -> (Tensor, Tensor)",
    autograd=(_setup_rotary_context, _rotary_backward),
)
def _rotary_triton(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape, dtype=value.dtype), _empty_state(query)


@triton_operator("relu_linear_attention_rotary_state(Tensor key, Tensor value, Tensor cos, Tensor sin) -> Tensor")
def rotary_state_triton(key: Tensor, *_: Any) -> Tensor:
    """The state of keys, values and their angles, by the kernel."""
    return _empty_state(key)


@triton_operator(
    "relu_linear_attention_rotary_apply(Tensor query, Tensor state, Tensor cos, Tensor sin, ScalarType dtype,"
    " float eps) -> Tensor"
)
def rotary_apply_triton(
    query: Tensor, state: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, eps: float
) -> Tensor:
    """The output of queries and their angles, of a dtype, for a state."""
    return query.new_empty(query.shape, dtype=dtype)
