"""Residual connection and modulated norm in one kernel against the two operations that it stands for."""

import pytest
import torch

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.gated_residual import gated_residual
from diffusers_sana.kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_reference
from diffusers_sana.kernels.modulated_layer_norm import modulated_layer_norm
from tests.kernels.kernel_checks import DEVICE, DTYPES, check_kernel, check_operator
from tests.numerics import assert_close_fp32


def tensors(batch, tokens, channels, dtype=torch.float32, rows=None, has_gate=True):
    """Residual and branch, and modulations that are views into one tensor of six, as in a transformer block."""
    residual, hidden_states = torch.randn(2, batch, tokens, channels).to(DEVICE, dtype)
    gate, scale, shift = torch.randn(rows or batch, 6, channels).to(DEVICE, dtype).chunk(6, dim=1)[1:4]
    given = {"residual": residual, "hidden_states": hidden_states, "gate": gate if has_gate else None}
    return given | {"scale": scale, "shift": shift}


def both(**given):
    """The two outputs as one tensor, as the checks want."""
    return torch.cat(gated_residual_norm(**given))


def separate(residual, hidden_states, gate, scale, shift):
    total = residual + hidden_states if gate is None else gated_residual(residual, hidden_states, gate)
    return torch.cat([total, modulated_layer_norm(total, scale, shift)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("has_gate", [True, False])
def test_is_the_two_operations(dtype, has_gate):
    given = {
        name: None if tensor is None else tensor.cpu()
        for name, tensor in tensors(2, 7, 100, dtype, has_gate=has_gate).items()
    }
    with torch.no_grad():
        assert torch.equal(both(**given), separate(**given))


def test_gradients():
    shapes = [(2, 3, 5), (2, 3, 5), (1, 1, 5), (2, 1, 5), (2, 1, 5)]
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(gated_residual_norm, inputs)
    assert torch.autograd.gradcheck(lambda x, y, *m: gated_residual_norm(x, y, None, *m), inputs[:2] + inputs[3:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 100), (1, 3, 1152)], ids=str)
def test_kernel(shape, has_gate, dtype):
    given = tensors(*shape, dtype, has_gate=has_gate)
    check_kernel(both, given, backward=False)
    with kernel_mode("triton"):
        assert torch.equal(both(**given), separate(**given))  # also bit by bit, kernels against kernels


def test_kernel_with_one_modulation_and_mixed_dtypes():
    given = tensors(3, 4, 64, torch.float16, rows=1)
    check_kernel(both, given, backward=False)
    check_kernel(both, given | {"scale": given["scale"].float()}, backward=False)


def test_kernel_with_strides():
    given = tensors(2, 6, 50, torch.float16)
    image = given["hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
    rows = given["residual"].repeat_interleave(2, dim=1)[:, ::2]
    check_kernel(both, given | {"hidden_states": image, "residual": rows}, backward=False)


def test_kernel_under_grad():
    """Then the two kernels run, which have gradients."""
    check_kernel(both, tensors(2, 5, 40))
    check_operator(both, tensors(2, 5, 40))


def test_kernel_is_an_operator():
    given = tensors(2, 5, 40, torch.float16, rows=1)
    with kernel_mode("triton"), torch.no_grad():
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**given), both(**given))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"gate": torch.ones(2, 3, 8)}, "modulation"), ({"residual": torch.ones(1, 3, 8)}, "differ in shape")],
    ids=["gate", "residual"],
)
def test_kernel_refuses(change, message):
    given = {name: tensor.cpu() for name, tensor in tensors(2, 3, 8).items()} | change
    with kernel_mode("triton"), torch.no_grad(), pytest.raises(RuntimeError, match=message):
        gated_residual_norm(**given)
    for actual, expected in zip(gated_residual_norm(**given), gated_residual_norm_reference(**given), strict=True):
        assert_close_fp32(actual, expected)
