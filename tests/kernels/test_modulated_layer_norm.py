"""Layer norm with adaLN modulation against its formula in float64."""

import pytest
import torch
from torch.nn import functional as F

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.modulated_layer_norm import modulated_layer_norm
from diffusers_sana.kernels.triton import modulated_layer_norm as kernels
from tests.kernels.kernel_checks import DEVICE, DTYPES, check_kernel, check_operator
from tests.numerics import assert_close_fp32, assert_no_worse, relative_error


SHAPES = {"one_token": (1, 1, 63), "tokens": (2, 17, 100), "wide": (3, 5, 1152)}


def formula(x, scale, shift, eps=1e-6):
    x = x.double()
    centered = x - x.mean(dim=-1, keepdim=True)
    normed = centered / (centered.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return normed * (1 + scale.double()) + shift.double()


def modulation(shape, rows=None):
    return (torch.randn(rows or shape[0], 1, shape[-1]) for _ in range(2))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula(shape):
    x, (scale, shift) = torch.randn(shape) * 3 + 1, modulation(shape)
    assert_close_fp32(modulated_layer_norm(x, scale, shift), formula(x, scale, shift))
    reference = modulated_layer_norm(x.double(), scale.double(), shift.double())
    assert relative_error(reference, formula(x, scale, shift)) < 1e-13


def test_scale_and_shift_are_not_exchanged():
    x = torch.randn(1, 4, 16)
    ones, zeros = torch.ones(1, 1, 16), torch.zeros(1, 1, 16)
    normed = F.layer_norm(x, (16,), eps=1e-6)
    assert_close_fp32(modulated_layer_norm(x, ones, zeros), 2 * normed)
    assert_close_fp32(modulated_layer_norm(x, zeros, ones), normed + 1)


def test_one_modulation_serves_the_batch():
    x, (scale, shift) = torch.randn(3, 7, 32), modulation((3, 7, 32), rows=1)
    assert_close_fp32(modulated_layer_norm(x, scale, shift), formula(x, scale, shift))


def test_epsilon():
    x, (scale, shift) = torch.randn(2, 3, 8) * 1e-3, modulation((2, 3, 8))
    assert_close_fp32(modulated_layer_norm(x, scale, shift, eps=0.1), formula(x, scale, shift, eps=0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    x = (torch.randn(4, 64, 300) * 5).to(dtype)
    scale, shift = (tensor.to(dtype) for tensor in modulation(x.shape))
    reference = formula(x, scale, shift)
    out = modulated_layer_norm(x, scale, shift)
    assert out.dtype == dtype
    assert_no_worse(out, reference.to(dtype), reference, factor=1.0)
    eager = F.layer_norm(x, (300,), eps=1e-6) * (1 + scale) + shift
    assert relative_error(out, reference) < relative_error(eager, reference)


def test_strided_input():
    x = torch.randn(2, 32, 20).transpose(1, 2)  # channels first in memory
    scale, shift = modulation((2, 20, 32))
    assert_close_fp32(modulated_layer_norm(x, scale, shift), formula(x, scale, shift))


def test_gradients():
    inputs = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, 3, 9), (2, 1, 9), (2, 1, 9))]
    assert torch.autograd.gradcheck(modulated_layer_norm, inputs)


def test_compiles_whole():
    x, (scale, shift) = torch.randn(2, 5, 33), modulation((2, 5, 33))
    compiled = torch.compile(modulated_layer_norm, fullgraph=True, backend="eager")
    assert_close_fp32(compiled(x, scale, shift), formula(x, scale, shift))


def tensors(batch, tokens, channels, dtype=torch.float32, rows=None):
    """Hidden states, and scale and shift that are views into one tensor of six, as in a transformer block."""
    shift, scale = torch.randn(rows or batch, 6, channels).to(DEVICE, dtype).chunk(6, dim=1)[:2]
    return {
        "hidden_states": (torch.randn(batch, tokens, channels) * 3 + 1).to(DEVICE, dtype),
        "scale": scale,
        "shift": shift,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 1, 63), (2, 63, 100), (3, 100, 64), (2, 35, 1152), (2, 17, 2240)], ids=str
)
def test_kernel(shape, dtype):
    check_kernel(modulated_layer_norm, tensors(*shape, dtype))


def test_kernel_with_one_modulation_for_the_batch():
    check_kernel(modulated_layer_norm, tensors(3, 41, 100, rows=1))
    one_of_two = tensors(3, 41, 100)
    check_kernel(modulated_layer_norm, one_of_two | {"scale": one_of_two["scale"][:1]}, eps=0.1)


def test_kernel_with_mixed_dtypes_and_strides():
    """A modulation in fp32 beside half activations; activations with channels first in memory."""
    given = tensors(2, 20, 48)
    x = given["hidden_states"].half().transpose(1, 2).contiguous().transpose(1, 2)
    check_kernel(modulated_layer_norm, given | {"hidden_states": x})
    check_kernel(modulated_layer_norm, given | {"scale": given["scale"].repeat_interleave(2, -1)[..., ::2]})


def test_kernel_of_rows_far_from_zero():
    """The variance is that of the centred row: no cancellation."""
    given = tensors(1, 5, 300)
    check_kernel(modulated_layer_norm, given | {"hidden_states": given["hidden_states"] + 1000})


def test_kernel_of_programs_with_several_blocks(monkeypatch):
    """Of the backward pass; the last block of an image is not full."""
    assert kernels._rows_a_program(2048, block_r=1) == 16
    assert kernels._rows_a_program(40000, block_r=2) == 80
    monkeypatch.setattr(kernels, "_rows_a_program", lambda rows, block_r: 3 * block_r)
    check_kernel(modulated_layer_norm, tensors(2, 100, 1000))


def test_kernel_is_an_operator():
    check_operator(modulated_layer_norm, tensors(2, 7, 40))
    check_operator(modulated_layer_norm, tensors(2, 7, 40, torch.float16, rows=1))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 8), (2, 3, 8)), "modulation"),
        (((2, 3, 8), (8,)), "modulation"),
        (((1, 3, 8), (2, 1, 8)), "modulation"),
        (((3, 8), (1, 8)), "modulation"),
        (((1, 1, 4097), (1, 1, 4097)), "4097"),
    ],
    ids=str,
)
def test_kernel_refuses(shapes, message):
    x, scale, shift = (torch.randn(shapes[0]), *(torch.randn(shapes[1]) for _ in range(2)))
    with kernel_mode("triton"), pytest.raises(RuntimeError, match=message):
        modulated_layer_norm(x, scale, shift)
    assert_close_fp32(modulated_layer_norm(x, scale, shift), formula(x, scale, shift))
