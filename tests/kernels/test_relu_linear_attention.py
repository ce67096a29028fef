"""ReLU linear attention against the quadratic formula in float64."""

import pytest
import torch
import triton
import triton.language as tl

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.relu_linear_attention import (
    block_causal_linear_attention,
    relu_linear_attention,
    relu_linear_attention_reference,
    rotate_pairs,
)
from diffusers_sana.kernels.triton.relu_linear_attention import _split
from tests.kernels.kernel_checks import DEVICE, DTYPES, check_kernel, check_operator, to_device
from tests.numerics import assert_close_fp32, assert_no_worse, relative_error


def qkv(shape, dtype=torch.float32, scale=1.0):
    return tuple((torch.randn(shape) * scale).to(dtype) for _ in range(3))


def quadratic(query, key, value, eps=1e-15):
    """Attention with the N x N matrix written out."""
    weights = torch.einsum("bihd,bjhd->bhij", query.double().relu(), key.double().relu())
    weights = weights / (weights.sum(dim=-1, keepdim=True) + eps)
    return torch.einsum("bhij,bjhd->bihd", weights, value.double())


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 32), (2, 63, 3, 16), (1, 100, 2, 32), (1, 4096, 1, 32), (3, 17, 5, 1)],
    ids=["one_token", "odd", "tokens", "many", "narrow"],
)
def test_equals_the_quadratic_formula(shape):
    query, key, value = qkv(shape)
    out = relu_linear_attention(query, key, value)
    assert out.is_contiguous()
    assert_close_fp32(out, quadratic(query, key, value))


def test_float64_is_the_reference():
    query, key, value = (x.double() for x in qkv((2, 63, 3, 16)))
    assert relative_error(relu_linear_attention(query, key, value), quadratic(query, key, value)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    query, key, value = qkv((2, 1000, 2, 32), dtype)
    reference = quadratic(query, key, value)
    out = relu_linear_attention(query, key, value)
    assert out.dtype == dtype
    assert_no_worse(out, reference.to(dtype), reference, factor=1.0)


def test_sums_beyond_the_range_of_fp16():
    query, key, value = qkv((1, 4096, 1, 32), torch.float16, scale=100.0)
    key = key.abs()
    out = relu_linear_attention(query, key, value)
    assert key.double().sum(dim=1).max() > 65504
    assert relative_error(out, quadratic(query, key, value)) < 1e-3


def test_nothing_attended_gives_zero_and_finite_gradients():
    query, key, value = qkv((1, 9, 2, 8))
    query[:, 0] = -1.0
    query.requires_grad_(), key.requires_grad_(), value.requires_grad_()
    out = relu_linear_attention(query, key, value)
    assert (out[:, 0] == 0).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (query, key, value))
    assert (query.grad[:, 0] == 0).all()


def test_gradients_equal_those_of_the_quadratic_formula():
    inputs = qkv((2, 31, 2, 8))
    gradients = []
    for function in (relu_linear_attention, quadratic):
        leaves = [x.double().requires_grad_() for x in inputs]
        function(*leaves).cos().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-10


def test_epsilon_is_added_to_the_denominator():
    query, key, value = qkv((1, 5, 1, 4))
    out = relu_linear_attention(query, key, value, eps=10.0)
    assert_close_fp32(out, quadratic(query, key, value, eps=10.0))


def test_strides_and_other_key_lengths():
    packed = torch.randn(2, 40, 3, 2, 16).permute(2, 0, 1, 3, 4)  # query, key, value of one projection
    query, key, value = packed[0][:, ::2], packed[1], packed[2]
    assert_close_fp32(relu_linear_attention(query, key, value), quadratic(query, key, value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype):
    query, key, value = qkv((2, 500, 2, 32), dtype)
    expected = relu_linear_attention(query, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(relu_linear_attention(query, key, value), expected)


def test_compiles_whole():
    query, key, value = qkv((2, 20, 2, 8))
    compiled = torch.compile(relu_linear_attention, fullgraph=True, backend="eager")
    assert_close_fp32(compiled(query, key, value), quadratic(query, key, value))


def tensors(shape, dtype=torch.float32):
    return to_device(dict(zip(("query", "key", "value"), qkv(shape), strict=True)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 63, 2, 32), (1, 300, 1, 16), (1, 40, 1, 64)], ids=str)
def test_kernel(shape, dtype):
    check_kernel(relu_linear_attention, tensors(shape, dtype))


@triton.jit
def _sum_of_parts(x_ptr, out_ptr, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    parts, b_scale = _split(tl.load(x_ptr + offsets), DTYPE)
    b_sum = tl.zeros([SIZE, SIZE], tl.float32)
    for i in tl.static_range(len(parts) - 1, -1, -1):
        b_sum += parts[i].to(tl.float32)
    tl.store(out_ptr + offsets, b_sum * b_scale[None, :])


@pytest.mark.parametrize("dtype", [tl.float32, tl.float16, tl.bfloat16], ids=str)
def test_half_parts_of_the_state_add_up_to_fp32(dtype):
    """Each bf16 part has 8 of the 24 bits, so it takes three: without the last, errors of 2^-17 are left.

    Where positive queries weigh terms of the state that cancel, so much of an error would be seen in half outputs.
    """
    x = torch.randn(32, 32, device=DEVICE) * 10 ** torch.linspace(-6, 6, 32, device=DEVICE)
    out = torch.empty_like(x)
    _sum_of_parts[(1,)](x, out, DTYPE=dtype, SIZE=32)
    largest = x.abs().amax(dim=0)
    assert ((out - x).abs() <= 2**-23 * largest).all()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
def test_kernel_keeps_the_state_in_fp32_beside_half_queries(dtype):
    query, key, value = (x.to(DEVICE) for x in qkv((1, 64, 2, 16)))
    query = query.to(dtype)
    with kernel_mode("triton"), torch.no_grad():
        out = relu_linear_attention(query, key, value)
    reference = relu_linear_attention_reference(query.double(), key.double(), value.double())
    assert out.dtype == torch.float32
    assert relative_error(out, reference) < 5e-7


def test_kernel_with_one_token():
    """Whose attention is to itself: the gradients of query and key are zero but for rounding."""
    check_kernel(relu_linear_attention, tensors((1, 1, 1, 32)), backward=False)


@pytest.mark.parametrize("head_dim", [1, 24, 40])
def test_kernel_pads_the_head(head_dim):
    check_kernel(relu_linear_attention, tensors((1, 70, 2, head_dim), torch.float16))


@pytest.mark.parametrize("splits", [2, 5])
def test_kernel_sums_partial_states(splits):
    """Few in the next kernel, many in between."""
    shape = (1, 8 * 16 * splits, 1, 16)
    check_kernel(relu_linear_attention, tensors(shape, torch.float16))


@pytest.mark.parametrize("interleaved", [False, True])
def test_kernel_reads_packed_projections_in_place(interleaved):
    """Of SANA, `[B, N, 3, H, D]`, and of DC-AE, `[B, N, H, 3, D]`."""
    packed = torch.randn(2, 70, *((2, 3, 16) if interleaved else (3, 2, 16))).to(DEVICE, torch.float16)
    parts = packed.unbind(-2 if interleaved else 2)
    check_kernel(relu_linear_attention, dict(zip(("query", "key", "value"), parts, strict=True)))


def test_kernel_with_other_strides_and_key_lengths():
    """Images whose channels are not the last axis, and heads before tokens."""
    given = tensors((1, 70, 2, 16))
    given["query"] = given["query"].permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)[:, 5:40]
    given["value"] = given["value"].transpose(1, 2).contiguous().transpose(1, 2)
    check_kernel(relu_linear_attention, given)
    check_kernel(relu_linear_attention, given | {"query": tensors((1, 130, 2, 16))["query"]})


@pytest.mark.parametrize("wide", ["query", "key", "value"])
def test_kernel_with_mixed_dtypes(wide):
    given = tensors((1, 40, 2, 16), torch.float16)
    check_kernel(relu_linear_attention, given | {wide: given[wide].float()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_with_entries_of_all_sizes(dtype):
    """Sums beyond the range of fp16, and channels a thousand times smaller than others."""
    sizes = torch.logspace(-2, 2, 32)
    given = {name: tensor * sizes for name, tensor in tensors((1, 300, 1, 32)).items()}
    given["key"] = given["key"].abs() * 100
    check_kernel(relu_linear_attention, {name: tensor.to(dtype) for name, tensor in given.items()})
    with kernel_mode("triton"):
        out = relu_linear_attention(*(tensor.to(dtype) for tensor in given.values()))
    reference = relu_linear_attention_reference(*(tensor.to(dtype).double() for tensor in given.values()))
    for channel in (0, 31):
        assert relative_error(out[..., channel], reference[..., channel]) < max(1e-6, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_where_nothing_is_attended(dtype):
    """A query without a positive entry, and one whose only positive entry no key shares."""
    given = tensors((1, 80, 2, 16), dtype)
    given["key"][..., 3] = -1.0
    given["query"][:, :2] = -1.0
    given["query"][:, 1, :, 3] = 1.0
    check_kernel(relu_linear_attention, given)
    leaves = [tensor.detach().requires_grad_() for tensor in given.values()]
    with kernel_mode("triton"):
        out = relu_linear_attention(*leaves)
    out.sum().backward()
    assert (out[:, :2] == 0).all()
    assert (leaves[0].grad[:, :2] == 0).all()


def test_kernel_epsilon():
    check_kernel(relu_linear_attention, tensors((1, 40, 2, 16)), eps=10.0)


def test_kernel_under_autocast():
    given = tensors((1, 40, 2, 16))
    with kernel_mode("triton"):
        expected = relu_linear_attention(**given)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(relu_linear_attention(**given), expected)


def test_kernel_is_an_operator():
    check_operator(relu_linear_attention, tensors((2, 40, 2, 16), torch.float16))


def in_two_parts(query, key, value):
    """As of two processes with half of the keys and values each."""
    states = []
    (key, other_key), (value, other_value) = key.chunk(2, dim=1), value.chunk(2, dim=1)
    relu_linear_attention(query, other_key, other_value, reduce_state=lambda state: states.append(state) or state)
    return relu_linear_attention(query, key, value, reduce_state=lambda state: state.add_(states[0]))


def test_states_of_parts_add_up():
    query, key, value = qkv((2, 63, 3, 16))
    assert_close_fp32(in_two_parts(query, key, value), quadratic(query, key, value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [63, 8 * 16 * 6], ids=["whole", "split"])
def test_kernel_with_states_of_parts(tokens, dtype):
    check_kernel(in_two_parts, tensors((1, tokens, 2, 16), dtype), backward=False)


def test_states_of_parts_are_operators():
    given = tensors((2, 40, 2, 16), torch.float16)
    with kernel_mode("triton"):
        compiled = torch.compile(in_two_parts, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**given), in_two_parts(**given))


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ([(1, 4, 2, 200)] * 3, "200"),
        ([(1, 4, 2, 16), (1, 4, 1, 16), (1, 4, 1, 16)], "must agree"),
        ([(1, 4, 2, 16), (1, 0, 2, 16), (1, 0, 2, 16)], "empty"),
    ],
    ids=["wide", "heads", "empty"],
)
def test_what_the_kernel_refuses(shapes, reason):
    given = [torch.randn(shape, device=DEVICE) for shape in shapes]
    with kernel_mode("triton"), pytest.raises(RuntimeError, match=reason):
        relu_linear_attention(*given)
    assert relu_linear_attention(*given).shape == shapes[0]


def angles(tokens, head_dim):
    """Cosines and sines for `rotary`, of angles between 0 and 3."""
    table = torch.rand(tokens, head_dim // 2, device=DEVICE) * 3
    return table.cos(), table.sin()


def rotary_quadratic(query, key, value, rotary):
    """With the N x N matrices of numerator and denominator written out, and the rotation as complex numbers."""
    unit = torch.polar(torch.ones_like(rotary[0]).double(), torch.atan2(rotary[1], rotary[0]).double())
    query, key = query.double().relu(), key.double().relu()
    pairs = [torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * unit[:, None] for x in (query, key)]
    weights = torch.einsum("bihd,bjhd->bhij", pairs[0], pairs[1].conj()).real
    total = torch.einsum("bihd,bjhd->bhi", query, key)
    return torch.einsum("bhij,bjhd,bhi->bihd", weights, value.double(), 1 / (total + 1e-15))


@pytest.mark.parametrize("shape", [(2, 63, 3, 16), (1, 200, 2, 112)], ids=str)
def test_rotary_equals_the_quadratic_formula(shape):
    query, key, value = (x.to(DEVICE) for x in qkv(shape))
    rotary = angles(shape[1], shape[-1])
    assert_close_fp32(
        relu_linear_attention(query, key, value, rotary=rotary), rotary_quadratic(query, key, value, rotary)
    )


def test_rotary_denominator_beyond_the_range_of_fp16():
    """diffusers sums the keys in fp16 there, and its output is zero."""
    query, key, value = (x.abs() for x in qkv((1, 4096, 1, 112), torch.float16, scale=10.0))
    rotary = tuple(table.cpu() for table in angles(4096, 112))
    out = relu_linear_attention(query, key, value, rotary=rotary)
    assert (query.double()[0, 0, 0] @ key.double().sum(dim=1)[0, 0]) > 65504
    expected = relu_linear_attention_reference(query.double(), key.double(), value.double(), rotary=rotary)
    assert relative_error(out, expected) < 1e-3


def test_rotation_turns_adjacent_channels():
    turned = rotate_pairs(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert turned.tolist() == [[0.0, 1.0, 0.0, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 63, 2, 32), (1, 40, 2, 112), (1, 8 * 16 * 3, 1, 8)], ids=str)
def test_rotary_kernel(shape, dtype):
    """Of one block of the values and of two; with one partial state and with several."""
    check_kernel(relu_linear_attention, tensors(shape, dtype), rotary=angles(shape[1], shape[-1]))


def test_rotary_kernel_reads_other_strides():
    given = tensors((1, 70, 2, 16))
    given["key"] = given["key"].permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    given["value"] = given["value"].transpose(1, 2).contiguous().transpose(1, 2)
    check_kernel(relu_linear_attention, given, rotary=angles(70, 16))


def test_rotary_kernel_where_nothing_is_attended():
    given = tensors((1, 80, 2, 16))
    given["query"][:, :2] = -1.0
    check_kernel(relu_linear_attention, given, rotary=angles(80, 16))


def test_rotary_kernel_is_an_operator():
    check_operator(relu_linear_attention, tensors((2, 40, 2, 16), torch.float16), rotary=angles(40, 16))


def rotary_in_two_parts(query, key, value, cos, sin):
    """As of two processes with half of the tokens each: the output of the first."""
    states, half = [], query.shape[1] // 2
    other, own = slice(half, None), slice(half)

    def collect(state):
        states.append(state.clone())
        return sum(states)

    for part in (other, own):
        rotary = (cos[part], sin[part])
        out = relu_linear_attention(query[:, part], key[:, part], value[:, part], rotary=rotary, reduce_state=collect)
    return out


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_rotary_states_of_parts_add_up(mode):
    given, rotary = tensors((1, 80, 2, 16)), angles(80, 16)
    with kernel_mode(mode):
        expected = relu_linear_attention(**given, rotary=rotary)
        assert_close_fp32(rotary_in_two_parts(*given.values(), *rotary), expected[:, :40])


def block_causal_quadratic(query, key, value, rotary, ends):
    """Each block against all tokens up to its end."""
    outputs, start = [], 0
    for end in ends:
        seen = (x[:, :end] for x in (query, key, value))
        outputs.append(rotary_quadratic(*seen, tuple(table[:end] for table in rotary))[:, start:])
        start = end
    return torch.cat(outputs, dim=1)


def in_blocks(query, key, value, rotary, ends):
    """Outputs of all blocks, and the last state."""
    outputs, past, start = [], None, 0
    for end in ends:
        own = slice(start, end)
        angles_of_block = None if rotary is None else tuple(table[own] for table in rotary)
        block = (x[:, own] for x in (query, key, value))
        out, past = block_causal_linear_attention(*block, past, rotary=angles_of_block)
        outputs.append(out)
        start = end
    return torch.cat(outputs, dim=1), past


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("head_dim", [16, 112])
def test_blocks_attend_to_themselves_and_to_all_before(head_dim, mode):
    given, rotary = tensors((1, 80, 2, head_dim)), angles(80, head_dim)
    ends = (32, 48, 80)
    with kernel_mode(mode):
        out, state = in_blocks(*given.values(), rotary, ends)
    assert_close_fp32(out, block_causal_quadratic(*given.values(), rotary, ends).float())
    assert state.shape == (1, 2, head_dim + 1, head_dim)
    assert state.dtype == torch.float32
    keys, values = given["key"].relu(), given["value"]
    turned = rotate_pairs(keys.transpose(1, 2), *rotary)
    expected = torch.cat([turned.mT @ values.transpose(1, 2), keys.sum(dim=1)[:, :, None]], dim=2)
    assert_close_fp32(state, expected)  # rows of keys in both, so a state can go from one to the other


def test_blocks_without_positions_are_a_part_of_the_whole():
    given = qkv((2, 24, 2, 16))
    out, _ = in_blocks(*given, None, (16, 24))
    assert_close_fp32(out[:, 16:], relu_linear_attention(*given)[:, 16:])
    assert_close_fp32(out[:, :16], relu_linear_attention(*(x[:, :16] for x in given)))


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"), [((1, 4, 2, 130), None, "130"), ((1, 4, 2, 8), torch.float16, "fp32")], ids=str
)
def test_what_the_rotary_kernel_refuses(shape, dtype, reason):
    given = tensors(shape)
    rotary = tuple(table.to(dtype) for table in angles(shape[1], shape[-1]))
    with kernel_mode("triton"), pytest.raises(RuntimeError, match=reason):
        relu_linear_attention(**given, rotary=rotary)
    assert relu_linear_attention(**given, rotary=rotary).shape == shape
