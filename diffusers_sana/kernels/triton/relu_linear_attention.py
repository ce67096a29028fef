"""ReLU linear attention in two passes: keys and values to one state per head, then queries times that state.

With R = relu(q), P = relu(k): state S = sum_j P_j v_j^T and key sum z = sum_j P_j; out = R S / (R . z + eps). A
program processes a range of rows of one head. Adjacent programs process adjacent heads, so that the pieces of a row,
64 bytes each for 32 channels in bf16, are read at about the same time. Per element in half precision: 2 bytes read
from each of q, k and v, 2 written; about 8 D FLOPs. Memory-bound at D = 32.

Products of half-precision numbers are exact in fp32, so S is a sum of half-precision matrix products. S itself stays
fp32: for a product with a half-precision operand it is split into half-precision matrices, see `_split`, which is as
accurate as fp32 and faster.

Backward, with dO the gradient of the output and t = S dO: dq = (t - z (R . t) / den) / den where q > 0. The sums over
queries dS = sum_i R_i dO_i^T / den_i and dz = -sum_i R_i (R_i . t_i) / den_i^2 form a second state per head, which
is applied to keys and values: dv = P dS; dk = dS v + dz where k > 0.

A state is `[D + 1, D]`, the last row for z. Each split of the rows gives one partial state; they are added in a fixed
order.

With rotary positions, rows are turned in registers, where a channel meets the other one of its pair through a second
load, from the cache. Turned rows are fp32, and so are the products. A program holds the state for `BLOCK_V` channels
of the values, so that heads of 128 channels fit too; z is formed by the programs of the first such channels.

Legend: B batch, N tokens, H heads, D head_dim.
"""
# ruff: noqa: RUF005

import torch
import triton
import triton.language as tl
from torch import Tensor


REDUCING_PROGRAMS = 512  # four per multiprocessor of the largest GPUs, each with three blocks in flight
APPLYING_PROGRAMS = 2048
MAX_FOLDED = 4  # partial states that the next kernel adds itself; more are added beforehand
OPTIONS = {"num_warps": 4, "num_stages": 3}
BLOCK_V = 64


def _launch_config(heads: int, head_dim: int, tokens: int, itemsize: int, programs: int) -> tuple[int, int, int]:
    """Rows and channels of a block, and rows of a program, for `heads` of the whole batch.

    A program has enough rows for its state to be small in comparison: an eighth, for two half-precision tensors.
    Blocks are small enough for the backward pass to stay in registers, of which fp32 products need the most.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_n = 16 if block_d > 32 else 128 // itemsize
    splits = max(1, min(programs // heads, tokens // (8 * block_d)))
    return block_n, block_d, block_n * triton.cdiv(tokens, block_n * splits)


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x).to(x.dtype)  # keeps NaN


@triton.jit
def _split(x, DTYPE: tl.constexpr):
    """fp32 `x` as a sum of tensors of `DTYPE`, the largest first, times a power of two for each column.

    Three bf16 tensors, or two of fp16 rounded to nearest, keep the 24 bits of fp32. bf16 has the range of fp32; for
    fp16 the power of two brings the largest of a column to between 2^14 and 2^15.
    """
    PARTS: tl.constexpr = 1 if tl.float32 == DTYPE else (2 if tl.float16 == DTYPE else 3)
    b_parts, b_scale = (), tl.full([x.shape[1]], 1.0, tl.float32)
    if tl.float16 == DTYPE:
        b_bits = tl.max(tl.abs(x), axis=0).to(tl.int32, bitcast=True) & 0x7F800000
        b_bits = tl.maximum(b_bits, 32 << 23) - (14 << 23)
        b_scale = b_bits.to(tl.float32, bitcast=True)
        x *= ((254 << 23) - b_bits).to(tl.float32, bitcast=True)[None, :]  # by 1 / b_scale
    for _ in tl.static_range(PARTS):
        b_part = x.to(DTYPE)
        b_parts = b_parts + (b_part,)  # type: ignore[assignment]
        x -= b_part.to(tl.float32)
    return b_parts, b_scale


@triton.jit
def _dot(x, parts, b_scale):
    """`x` times the fp32 matrix that `_split` took apart for the dtype of `x`."""
    b_out = tl.zeros([x.shape[0], parts[0].shape[1]], tl.float32)
    for i in tl.static_range(len(parts) - 1, -1, -1):  # the smallest first
        b_out = tl.dot(x, parts[i], b_out, input_precision="ieee")
    return b_out * b_scale[None, :]


@triton.jit
def _load(p_x, m_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    return tl.load(p_x, mask=m_n[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)


@triton.jit
def _store(p_x, b_x, m_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    tl.store(p_x, b_x, mask=m_n[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :])


@triton.jit
def _range_of(tokens, rows):
    """First row of the program's split, in 64 bits, and the number of its rows."""
    first = tl.program_id(1).to(tl.int64) * rows
    return first, tl.minimum(tokens - first, rows).to(tl.int32)


@triton.jit
def _rows_of(x_ptr, stride_b, stride_n, stride_h, heads, first, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to the first block of the program's head and split."""
    i_b, i_h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    o_n = first + tl.arange(0, BLOCK_N)
    return x_ptr + i_b * stride_b + i_h * stride_h + o_n[:, None] * stride_n + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _step(stride_n, BLOCK_N: tl.constexpr):
    """From one block to the next, in 64 bits."""
    return tl.full([], BLOCK_N, tl.int64) * stride_n


@triton.jit
def _load_state(state_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """S `[BLOCK_D, BLOCK_D]` and z `[BLOCK_D]` of the program's head: the sum over the splits."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_state, b_sum = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    p_head = state_ptr + tl.program_id(0).to(tl.int64) * ((D + 1) * D)
    for _ in tl.static_range(SPLITS):
        b_state += tl.load(p_head + o_d[:, None] * D + o_d[None, :], mask=m_d[:, None] & m_d[None, :], other=0.0)
        b_sum += tl.load(p_head + D * D + o_d, mask=m_d, other=0.0)
        p_head += tl.num_programs(0).to(tl.int64) * ((D + 1) * D)
    return b_state, b_sum


@triton.jit
def _store_state(state_ptr, b_state, b_sum, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """S and z of the program's head, as the partial state of its split."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_s = tl.program_id(1).to(tl.int64)
    p_head = state_ptr + (i_s * tl.num_programs(0) + tl.program_id(0)) * ((D + 1) * D)
    tl.store(p_head + o_d[:, None] * D + o_d[None, :], b_state, mask=m_d[:, None] & m_d[None, :])
    tl.store(p_head + D * D + o_d, b_sum, mask=m_d)


@triton.jit
def _state_kernel(
    k_ptr, v_ptr, partials_ptr,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    heads, tokens, rows,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial states of keys and values."""
    first, left = _range_of(tokens, rows)
    p_k = _rows_of(k_ptr, stride_kb, stride_kn, stride_kh, heads, first, BLOCK_N, BLOCK_D)
    p_v = _rows_of(v_ptr, stride_vb, stride_vn, stride_vh, heads, first, BLOCK_N, BLOCK_D)
    b_state, b_sums = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, left, BLOCK_N):
        m_n = start + tl.arange(0, BLOCK_N) < left
        b_k, b_v = _relu(_load(p_k, m_n, D, BLOCK_D)), _load(p_v, m_n, D, BLOCK_D)
        if b_k.dtype != b_v.dtype:
            b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
        b_state = tl.dot(tl.trans(b_k), b_v, b_state, input_precision="ieee")
        b_sums += b_k.to(tl.float32)
        p_k += _step(stride_kn, BLOCK_N)
        p_v += _step(stride_vn, BLOCK_N)
    _store_state(partials_ptr, b_state, tl.sum(b_sums, axis=0), D, BLOCK_D)


@triton.jit
def _out_kernel(
    q_ptr, partials_ptr, out_ptr, state_ptr,
    stride_qb, stride_qn, stride_qh, stride_ob, stride_on, stride_oh,
    heads, tokens, rows, eps,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The output; and the sum of the partial states, where there are several."""
    first, left = _range_of(tokens, rows)
    p_q = _rows_of(q_ptr, stride_qb, stride_qn, stride_qh, heads, first, BLOCK_N, BLOCK_D)
    p_out = _rows_of(out_ptr, stride_ob, stride_on, stride_oh, heads, first, BLOCK_N, BLOCK_D)
    b_state, b_sum = _load_state(partials_ptr, D, BLOCK_D, SPLITS)
    if SPLITS > 1 and first == 0:
        _store_state(state_ptr, b_state, b_sum, D, BLOCK_D)
    b_parts, b_scale = _split(b_state, q_ptr.dtype.element_ty)
    for start in range(0, left, BLOCK_N):
        m_n = start + tl.arange(0, BLOCK_N) < left
        b_q = _relu(_load(p_q, m_n, D, BLOCK_D))
        b_den = tl.sum(b_q.to(tl.float32) * b_sum[None, :], axis=1) + eps
        _store(p_out, _dot(b_q, b_parts, b_scale) / b_den[:, None], m_n, D, BLOCK_D)
        p_q += _step(stride_qn, BLOCK_N)
        p_out += _step(stride_on, BLOCK_N)


@triton.jit
def _query_backward_kernel(
    grad_ptr, q_ptr, state_ptr, grad_q_ptr, partials_ptr,
    stride_gb, stride_gn, stride_gh, stride_qb, stride_qn, stride_qh, stride_ob, stride_on, stride_oh,
    heads, tokens, rows, eps,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of the query, and partial sums of the gradient of the state."""
    first, left = _range_of(tokens, rows)
    p_grad = _rows_of(grad_ptr, stride_gb, stride_gn, stride_gh, heads, first, BLOCK_N, BLOCK_D)
    p_q = _rows_of(q_ptr, stride_qb, stride_qn, stride_qh, heads, first, BLOCK_N, BLOCK_D)
    p_grad_q = _rows_of(grad_q_ptr, stride_ob, stride_on, stride_oh, heads, first, BLOCK_N, BLOCK_D)
    b_state, b_sum = _load_state(state_ptr, D, BLOCK_D, 1)
    b_parts, b_scale = _split(tl.trans(b_state), grad_ptr.dtype.element_ty)
    b_grad_state, b_grad_sum = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, left, BLOCK_N):
        m_n = start + tl.arange(0, BLOCK_N) < left
        b_grad, b_q = _load(p_grad, m_n, D, BLOCK_D), _relu(_load(p_q, m_n, D, BLOCK_D)).to(tl.float32)
        b_t = _dot(b_grad, b_parts, b_scale)
        b_total = tl.sum(b_q * b_sum[None, :], axis=1)
        # A query that attends to nothing has its positive entries where no key has any: it moves no gradient.
        b_inverse = tl.where(b_total == 0, 0.0, 1.0 / (b_total + eps))
        b_grad_den = -tl.sum(b_q * b_t, axis=1) * b_inverse * b_inverse
        b_grad_q = b_t * b_inverse[:, None] + b_grad_den[:, None] * b_sum[None, :]
        _store(p_grad_q, tl.where(b_q > 0, b_grad_q, 0.0), m_n, D, BLOCK_D)
        b_weights, b_scale_w = _split(b_q * b_inverse[:, None], b_grad.dtype)
        b_grad_state += _dot(tl.trans(b_grad), b_weights, b_scale_w)
        b_grad_sum += tl.sum(b_q * b_grad_den[:, None], axis=0)
        p_grad += _step(stride_gn, BLOCK_N)
        p_q += _step(stride_qn, BLOCK_N)
        p_grad_q += _step(stride_on, BLOCK_N)
    _store_state(partials_ptr, tl.trans(b_grad_state), b_grad_sum, D, BLOCK_D)


@triton.jit
def _key_value_backward_kernel(
    k_ptr, v_ptr, partials_ptr, grad_k_ptr, grad_v_ptr,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_ob, stride_on, stride_oh,
    heads, tokens, rows,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The gradients of key and value."""
    first, left = _range_of(tokens, rows)
    p_k = _rows_of(k_ptr, stride_kb, stride_kn, stride_kh, heads, first, BLOCK_N, BLOCK_D)
    p_v = _rows_of(v_ptr, stride_vb, stride_vn, stride_vh, heads, first, BLOCK_N, BLOCK_D)
    p_grad_k = _rows_of(grad_k_ptr, stride_ob, stride_on, stride_oh, heads, first, BLOCK_N, BLOCK_D)
    p_grad_v = _rows_of(grad_v_ptr, stride_ob, stride_on, stride_oh, heads, first, BLOCK_N, BLOCK_D)
    b_state, b_sum = _load_state(partials_ptr, D, BLOCK_D, SPLITS)
    b_parts_k, b_scale_k = _split(b_state, k_ptr.dtype.element_ty)
    b_parts_v, b_scale_v = _split(tl.trans(b_state), v_ptr.dtype.element_ty)
    for start in range(0, left, BLOCK_N):
        m_n = start + tl.arange(0, BLOCK_N) < left
        b_k, b_v = _relu(_load(p_k, m_n, D, BLOCK_D)), _load(p_v, m_n, D, BLOCK_D)
        b_grad_k = _dot(b_v, b_parts_v, b_scale_v) + b_sum[None, :]
        _store(p_grad_k, tl.where(b_k > 0, b_grad_k, 0.0), m_n, D, BLOCK_D)
        _store(p_grad_v, _dot(b_k, b_parts_k, b_scale_k), m_n, D, BLOCK_D)
        p_k += _step(stride_kn, BLOCK_N)
        p_v += _step(stride_vn, BLOCK_N)
        p_grad_k += _step(stride_on, BLOCK_N)
        p_grad_v += _step(stride_on, BLOCK_N)


@triton.jit
def _load_turned(p_x, cos_ptr, sin_ptr, o_n, m_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`relu` of the rows `o_n`, as they are and turned, in fp32."""
    o_d = tl.arange(0, BLOCK_D)
    is_odd = (o_d % 2)[None, :]
    b_x = _relu(_load(p_x, m_n, D, BLOCK_D)).to(tl.float32)
    b_other = _relu(_load(p_x + 1 - 2 * is_odd, m_n, D, BLOCK_D)).to(tl.float32)
    o_table = o_n[:, None] * (D // 2) + (o_d // 2)[None, :]
    mask = m_n[:, None] & (o_d < D)[None, :]
    b_cos = tl.load(cos_ptr + o_table, mask=mask, other=0.0)
    b_sin = tl.load(sin_ptr + o_table, mask=mask, other=0.0)
    return b_x, b_x * b_cos + tl.where(is_odd == 1, b_other, -b_other) * b_sin


@triton.jit
def _rotary_state_kernel(
    k_ptr, v_ptr, cos_ptr, sin_ptr, partials_ptr,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    heads, tokens, rows,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Partial states of turned keys and some channels of the values."""
    first, left = _range_of(tokens, rows)
    first_v = tl.program_id(2) * BLOCK_V
    p_k = _rows_of(k_ptr, stride_kb, stride_kn, stride_kh, heads, first, BLOCK_N, BLOCK_D)
    p_v = _rows_of(v_ptr, stride_vb, stride_vn, stride_vh, heads, first, BLOCK_N, BLOCK_V) + first_v
    o_d, o_v = tl.arange(0, BLOCK_D), first_v + tl.arange(0, BLOCK_V)
    b_state, b_sums = tl.zeros([BLOCK_D, BLOCK_V], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, left, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < left
        b_k, b_turned = _load_turned(p_k, cos_ptr, sin_ptr, first + o_n, m_n, D, BLOCK_D)
        b_v = tl.load(p_v, mask=m_n[:, None] & (o_v < D)[None, :], other=0.0).to(tl.float32)
        b_state = tl.dot(tl.trans(b_turned), b_v, b_state, input_precision="ieee")
        b_sums += b_k
        p_k += _step(stride_kn, BLOCK_N)
        p_v += _step(stride_vn, BLOCK_N)
    i_s = tl.program_id(1).to(tl.int64)
    p_head = partials_ptr + (i_s * tl.num_programs(0) + tl.program_id(0)) * ((D + 1) * D)
    tl.store(p_head + o_d[:, None] * D + o_v[None, :], b_state, mask=(o_d < D)[:, None] & (o_v < D)[None, :])
    if first_v == 0:
        tl.store(p_head + D * D + o_d, tl.sum(b_sums, axis=0), mask=o_d < D)


@triton.jit
def _rotary_out_kernel(
    q_ptr, state_ptr, cos_ptr, sin_ptr, out_ptr,
    stride_qb, stride_qn, stride_qh, stride_ob, stride_on, stride_oh,
    heads, tokens, rows, eps,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Some channels of the output."""
    first, left = _range_of(tokens, rows)
    first_v = tl.program_id(2) * BLOCK_V
    p_q = _rows_of(q_ptr, stride_qb, stride_qn, stride_qh, heads, first, BLOCK_N, BLOCK_D)
    p_out = _rows_of(out_ptr, stride_ob, stride_on, stride_oh, heads, first, BLOCK_N, BLOCK_V) + first_v
    o_d, o_v = tl.arange(0, BLOCK_D), first_v + tl.arange(0, BLOCK_V)
    p_head = state_ptr + tl.program_id(0).to(tl.int64) * ((D + 1) * D)
    mask = (o_d < D)[:, None] & (o_v < D)[None, :]
    b_state = tl.load(p_head + o_d[:, None] * D + o_v[None, :], mask=mask, other=0.0)
    b_sum = tl.load(p_head + D * D + o_d, mask=o_d < D, other=0.0)
    for start in range(0, left, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < left
        b_q, b_turned = _load_turned(p_q, cos_ptr, sin_ptr, first + o_n, m_n, D, BLOCK_D)
        b_den = tl.sum(b_q * b_sum[None, :], axis=1) + eps
        b_out = tl.dot(b_turned, b_state, input_precision="ieee") / b_den[:, None]
        tl.store(p_out, b_out, mask=m_n[:, None] & (o_v < D)[None, :])
        p_q += _step(stride_qn, BLOCK_N)
        p_out += _step(stride_on, BLOCK_N)


def _readable(x: Tensor) -> Tensor:
    """`x`, or a copy where the last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _reduce(partials: Tensor) -> Tensor:
    """At most `MAX_FOLDED` partial states."""
    return partials if partials.shape[0] <= MAX_FOLDED else partials.sum(dim=0, keepdim=True)


def _partial_states(key: Tensor, value: Tensor) -> Tensor:
    """Partial states `[splits, B, H, D + 1, D]` in fp32, contiguous; their sum is the state."""
    key, value = _readable(key), _readable(value)
    batch, tokens, heads, head_dim = key.shape
    itemsize = max(key.itemsize, value.itemsize)
    block_n, block_d, rows = _launch_config(batch * heads, head_dim, tokens, itemsize, REDUCING_PROGRAMS)
    splits = triton.cdiv(tokens, rows)
    partials = key.new_empty((splits, batch, heads, head_dim + 1, head_dim), dtype=torch.float32)
    _state_kernel[(batch * heads, splits)](
        key, value, partials, *key.stride()[:3], *value.stride()[:3], heads, tokens, rows,
        D=head_dim, BLOCK_N=block_n, BLOCK_D=block_d, **OPTIONS,
    )  # fmt: skip
    return _reduce(partials)


def _apply_states(query: Tensor, partials: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H, D]` in `dtype` and states `[B, H, D + 1, D]`, of at most `MAX_FOLDED` partial states."""
    query = _readable(query)
    batch, tokens, heads, head_dim = query.shape
    out = query.new_empty(query.shape, dtype=dtype)
    itemsize = max(query.itemsize, out.itemsize)
    state = partials[0] if partials.shape[0] == 1 else torch.empty_like(partials[0])
    block_n, block_d, rows = _launch_config(batch * heads, head_dim, tokens, itemsize, APPLYING_PROGRAMS)
    _out_kernel[(batch * heads, triton.cdiv(tokens, rows))](
        query, partials, out, state, *query.stride()[:3], *out.stride()[:3], heads, tokens, rows, eps,
        D=head_dim, BLOCK_N=block_n, BLOCK_D=block_d, SPLITS=partials.shape[0], **OPTIONS,
    )  # fmt: skip
    return out, state


def relu_linear_attention_forward(query: Tensor, key: Tensor, value: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H, D]` and states `[B, H, D + 1, D]` in fp32, both contiguous; see the reference."""
    return _apply_states(query, _partial_states(key, value), value.dtype, eps)


def relu_linear_attention_state(key: Tensor, value: Tensor) -> Tensor:
    """States `[B, H, D + 1, D]` in fp32."""
    return _partial_states(key, value).sum(dim=0)


def relu_linear_attention_apply(query: Tensor, state: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """Output `[B, N, H, D]` in `dtype` for given states."""
    return _apply_states(query, state[None], dtype, eps)[0]


def relu_linear_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, state: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    grad, query, key, value = (_readable(x) for x in (grad, query, key, value))
    batch, tokens, heads, head_dim = query.shape
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    itemsize = max(x.itemsize for x in (query, key, value))
    block_n, block_d, rows = _launch_config(batch * heads, head_dim, tokens, itemsize, REDUCING_PROGRAMS)
    partials = state.new_empty((triton.cdiv(tokens, rows), *state.shape))
    _query_backward_kernel[(batch * heads, partials.shape[0])](
        grad, query, state, grad_query, partials,
        *grad.stride()[:3], *query.stride()[:3], *grad_query.stride()[:3], heads, tokens, rows, eps,
        D=head_dim, BLOCK_N=block_n, BLOCK_D=block_d, **OPTIONS,
    )  # fmt: skip

    partials = _reduce(partials)
    block_n, block_d, rows = _launch_config(batch * heads, head_dim, key.shape[1], itemsize, APPLYING_PROGRAMS)
    _key_value_backward_kernel[(batch * heads, triton.cdiv(key.shape[1], rows))](
        key, value, partials, grad_key, grad_value,
        *key.stride()[:3], *value.stride()[:3], *grad_key.stride()[:3], heads, key.shape[1], rows,
        D=head_dim, BLOCK_N=block_n, BLOCK_D=block_d, SPLITS=partials.shape[0], **OPTIONS,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


def relu_linear_attention_rotary_state(key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """States `[B, H, D + 1, D]` in fp32 of turned keys; the last row is not turned."""
    key, value = _readable(key), _readable(value)
    batch, tokens, heads, head_dim = key.shape
    itemsize = max(key.itemsize, value.itemsize)
    block_n, block_d, rows = _launch_config(batch * heads, head_dim, tokens, itemsize, REDUCING_PROGRAMS)
    splits = triton.cdiv(tokens, rows)
    partials = key.new_empty((splits, batch, heads, head_dim + 1, head_dim), dtype=torch.float32)
    _rotary_state_kernel[(batch * heads, splits, triton.cdiv(head_dim, BLOCK_V))](
        key, value, cos.contiguous(), sin.contiguous(), partials,
        *key.stride()[:3], *value.stride()[:3], heads, tokens, rows,
        D=head_dim, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_V=BLOCK_V, **OPTIONS,
    )  # fmt: skip
    return partials.sum(dim=0)


def relu_linear_attention_rotary_apply(
    query: Tensor, state: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, eps: float
) -> Tensor:
    """Output `[B, N, H, D]` in `dtype` for given states."""
    query = _readable(query)
    batch, tokens, heads, head_dim = query.shape
    out = query.new_empty(query.shape, dtype=dtype)
    itemsize = max(query.itemsize, out.itemsize)
    block_n, block_d, rows = _launch_config(batch * heads, head_dim, tokens, itemsize, APPLYING_PROGRAMS)
    _rotary_out_kernel[(batch * heads, triton.cdiv(tokens, rows), triton.cdiv(head_dim, BLOCK_V))](
        query, state.contiguous(), cos.contiguous(), sin.contiguous(), out,
        *query.stride()[:3], *out.stride()[:3], heads, tokens, rows, eps,
        D=head_dim, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_V=BLOCK_V, **OPTIONS,
    )  # fmt: skip
    return out


def relu_linear_attention_rotary_forward(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H, D]` and states `[B, H, D + 1, D]` in fp32, both contiguous; see the reference."""
    state = relu_linear_attention_rotary_state(key, value, cos, sin)
    return relu_linear_attention_rotary_apply(query, state, cos, sin, value.dtype, eps), state
