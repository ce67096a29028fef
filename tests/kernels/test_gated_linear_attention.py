"""Gated linear attention against the sum over all pairs of tokens, in float64."""

import pytest
import torch

from diffusers_sana.kernels.gated_linear_attention import gated_linear_attention
from tests.numerics import relative_error


@pytest.mark.parametrize("divisor", [False, True])
def test_gated_linear_attention_is_a_sum_over_tokens(divisor):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 12, 3, 6, dtype=torch.float64) for _ in range(3))
    beta = torch.rand(2, 12, 3, dtype=torch.float64)
    angles = torch.randn(12, 3)
    cos, sin = angles.cos(), angles.sin()
    turns = torch.complex(cos.double(), sin.double())[:, None]
    turned_query, turned_key = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns for x in (query, key))
    weights = torch.einsum("bihc,bjhc->bhij", turned_query, turned_key.conj()).real * beta.mT[:, :, None]
    if divisor:
        weights = weights / torch.einsum("bihc,bjhc->bhi", query.relu(), key.relu())[..., None].add(1e-8)
    expected = torch.einsum("bhij,bjhc->bihc", weights, value)
    out = gated_linear_attention(query, key, value, beta, (cos, sin), divisor=divisor)
    assert relative_error(out, expected) < 1e-6


def test_sums_that_exceed_half_precision():
    """They are returned in fp32, for the norm that follows."""
    ones = torch.ones(1, 1000, 1, 8, dtype=torch.float16)
    rotary = torch.ones(1000, 4), torch.zeros(1000, 4)
    out = gated_linear_attention(ones * 4, ones * 4, ones * 4, ones[..., 0] / 2, rotary)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.full_like(out, 1000 * 4 * 4 * 4 * 8 / 2))
