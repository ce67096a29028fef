"""ReLU linear attention against the quadratic formula in float64."""

import pytest
import torch

from diffusers_sana.kernels.relu_linear_attention import relu_linear_attention
from tests.numerics import assert_close_fp32, assert_no_worse, relative_error


SHAPES = {
    "one_token": (1, 1, 1, 32),
    "odd": (2, 63, 3, 16),
    "tokens": (1, 100, 2, 32),
    "many": (1, 4096, 1, 32),
    "narrow": (3, 17, 5, 1),
}


def qkv(shape, dtype=torch.float32, scale=1.0):
    return tuple((torch.randn(shape) * scale).to(dtype) for _ in range(3))


def quadratic(query, key, value, eps=1e-15):
    """Attention with the N x N matrix written out."""
    weights = torch.einsum("bihd,bjhd->bhij", query.double().relu(), key.double().relu())
    weights = weights / (weights.sum(dim=-1, keepdim=True) + eps)
    return torch.einsum("bhij,bjhd->bihd", weights, value.double())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_quadratic_formula(shape):
    query, key, value = qkv(shape)
    out = relu_linear_attention(query, key, value)
    assert out.is_contiguous()
    assert_close_fp32(out, quadratic(query, key, value))


def test_float64_is_gold():
    query, key, value = (x.double() for x in qkv((2, 63, 3, 16)))
    assert relative_error(relu_linear_attention(query, key, value), quadratic(query, key, value)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    query, key, value = qkv((2, 1000, 2, 32), dtype)
    gold = quadratic(query, key, value)
    out = relu_linear_attention(query, key, value)
    assert out.dtype == dtype
    assert_no_worse(out, gold.to(dtype), gold, factor=1.0)


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
