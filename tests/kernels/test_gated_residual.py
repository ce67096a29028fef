"""Gated residual against its formula in float64."""

import pytest
import torch

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.gated_residual import gated_residual
from diffusers_sana.kernels.triton import gated_residual as kernels
from tests.kernels.kernel_checks import DEVICE, DTYPES, check_kernel, check_operator
from tests.numerics import assert_close_fp32, assert_no_worse, relative_error


def formula(residual, hidden_states, gate):
    return residual.double() + gate.double() * hidden_states.double()


def tensors(batch, tokens, channels, dtype=torch.float32, rows=None):
    """Residual and hidden states, and a gate that is a view into one tensor of six, as in a transformer block."""
    residual, hidden_states = torch.randn(2, batch, tokens, channels).to(DEVICE, dtype)
    gate = torch.randn(rows or batch, 6, channels).to(DEVICE, dtype).chunk(6, dim=1)[2]
    return {"residual": residual, "hidden_states": hidden_states, "gate": gate}


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 17, 100)], ids=str)
def test_equals_the_formula(shape, rows):
    given = tensors(*shape, rows=rows)
    assert_close_fp32(gated_residual(**given), formula(**given))
    reference = gated_residual(**{name: tensor.double() for name, tensor in given.items()})
    assert relative_error(reference, formula(**given)) < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    given = {name: tensor.cpu() for name, tensor in tensors(2, 64, 300, dtype).items()}
    reference = formula(**given)
    out = gated_residual(**given)
    assert out.dtype == dtype
    assert_no_worse(out, reference.to(dtype), reference, factor=1.0)
    # All but the rare sums that fp32 rounds onto the middle between two halves are the nearest half.
    assert (out != reference.to(dtype)).float().mean() < 1e-3
    twice = given["residual"] + given["gate"] * given["hidden_states"]
    assert relative_error(out, reference) < 0.9 * relative_error(twice, reference)


def test_returns_the_dtype_of_the_residual():
    given = tensors(1, 5, 8, torch.float16)
    given["gate"] = given["gate"].float()
    assert gated_residual(**given).dtype == torch.float16


def test_gradients():
    inputs = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, 3, 5), (2, 3, 5), (1, 1, 5))]
    assert torch.autograd.gradcheck(gated_residual, inputs)


def test_compiles_whole():
    given = tensors(2, 5, 33)
    compiled = torch.compile(gated_residual, fullgraph=True, backend="eager")
    assert_close_fp32(compiled(**given), formula(**given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 63), (2, 63, 100), (3, 100, 64), (1, 65, 1152)], ids=str)
def test_kernel(shape, dtype):
    check_kernel(gated_residual, tensors(*shape, dtype))


def test_kernel_with_one_gate_for_the_batch():
    check_kernel(gated_residual, tensors(3, 70, 100, rows=1))


def test_kernel_with_mixed_dtypes():
    given = tensors(2, 20, 48, torch.float16)
    check_kernel(gated_residual, given | {"gate": given["gate"].float()})
    check_kernel(gated_residual, given | {"residual": given["residual"].float()})


def test_kernel_with_strides():
    """Images with channels first, also as cotangents; every other row; a gate with gaps."""
    given = tensors(2, 70, 50, torch.float16)
    image = given["hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
    rows = given["residual"].repeat_interleave(2, dim=1)[:, ::2]
    gate = given["gate"].repeat_interleave(2, dim=2)[..., ::2]
    check_kernel(gated_residual, {"residual": rows, "hidden_states": image, "gate": gate})

    def seen_as_image(**tensors):
        return gated_residual(**tensors).transpose(1, 2) * 2

    check_kernel(seen_as_image, {"residual": image, "hidden_states": rows, "gate": gate})


def test_kernel_of_programs_with_several_blocks(monkeypatch):
    """As large images have them; the last block of an image is not full."""
    assert kernels._rows_a_program(2, 1024, 2240) == 64
    assert kernels._rows_a_program(2, 16384, 1152) == 5 * 64
    monkeypatch.setattr(kernels, "_rows_a_program", lambda batch, tokens, channels: 3 * 64)
    check_kernel(gated_residual, tensors(2, 7 * 64 + 1, 20))


def test_gradient_of_the_residual_may_be_changed():
    """It is not the memory of another gradient."""
    given = {name: tensor.requires_grad_() for name, tensor in tensors(1, 5, 8).items()}
    with kernel_mode("triton"):
        output = gated_residual(**given) * 1.0
    output.retain_grad()
    output.sum().backward()
    given["residual"].grad.zero_()
    assert (output.grad == 1).all()
    assert (given["hidden_states"].grad == given["gate"]).all()


def test_kernel_is_an_operator():
    check_operator(gated_residual, tensors(2, 7, 40))
    check_operator(gated_residual, tensors(2, 7, 40, torch.float16, rows=1))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 8), (2, 3, 8), (2, 3, 8)), "modulation"),
        (((2, 3, 8), (2, 3, 8), (8,)), "modulation"),
        (((2, 3, 8), (1, 3, 8), (1, 1, 8)), "differ in shape"),
    ],
    ids=str,
)
def test_kernel_refuses(shapes, message):
    given = [torch.randn(shape) for shape in shapes]
    with kernel_mode("triton"), pytest.raises(RuntimeError, match=message):
        gated_residual(*given)
    assert_close_fp32(gated_residual(*given), formula(*given))
