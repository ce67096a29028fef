"""Gated linear attention against the sum over all pairs of tokens, in float64."""

import pytest
import torch

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.gated_linear_attention import gated_linear_attention
from diffusers_sana.kernels.relu_linear_attention import rotate_pairs
from tests.kernels.kernel_checks import DEVICE, check_kernel, to_device
from tests.numerics import assert_close_fp32, relative_error


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


def tensors(shape, dtype=torch.float32):
    given = to_device({name: torch.randn(shape) for name in ("query", "key", "value")}, dtype)
    return given | to_device({"beta": torch.rand(shape[:-1])}, dtype)


def angles(tokens, head_dim):
    table = torch.rand(tokens, head_dim // 2, device=DEVICE) * 3
    return table.cos(), table.sin()


@pytest.mark.parametrize("divisor", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 33, 2, 16), torch.float32), ((1, 40, 1, 112), torch.float16), ((1, 24, 1, 128), torch.float32)],
    ids=str,
)
def test_kernels(shape, dtype, divisor):
    """Of one block of the values and of two."""
    given, rotary = tensors(shape, dtype), angles(shape[1], shape[-1])
    check_kernel(gated_linear_attention, given, backward=False, rotary=rotary, divisor=divisor)


def test_gradients_are_those_of_the_sum_over_tokens():
    """In mode "auto" they are PyTorch's; the kernels have none."""
    given, rotary = tensors((1, 9, 2, 8)), angles(9, 8)

    def quadratic(query, key, value, beta, rotary):
        query, key = (rotate_pairs(x.transpose(1, 2), *rotary) for x in (query, key))
        return ((query @ key.mT * beta.mT[:, :, None]) @ value.transpose(1, 2)).transpose(1, 2)

    gradients = []
    for function in (gated_linear_attention, quadratic):
        leaves = [x.double().requires_grad_() for x in given.values()]
        function(*leaves, rotary=rotary).sin().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-10
    given["beta"].requires_grad_()
    with kernel_mode("triton"), pytest.raises(RuntimeError, match="a gradient is needed"):
        gated_linear_attention(**given, rotary=rotary)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_states_of_parts_add_up(mode):
    """As of two processes with half of the tokens each."""
    given, (cos, sin), states = tensors((1, 16, 2, 8)), angles(16, 8), []

    def collect(state):
        states.append(state.clone())
        return sum(states)

    with kernel_mode(mode):
        expected = gated_linear_attention(**given, rotary=(cos, sin), divisor=True)
        for part in (slice(8, None), slice(8)):
            own = {name: x[:, part] for name, x in given.items()}
            rotary = cos[part], sin[part]
            out = gated_linear_attention(**own, rotary=rotary, divisor=True, reduce_state=collect)
    assert_close_fp32(out, expected[:, :8])
