"""Layer norm with adaLN modulation against its formula in float64."""

import pytest
import torch
from torch.nn import functional as F

from diffusers_sana.kernels.modulated_layer_norm import modulated_layer_norm
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
    gold = modulated_layer_norm(x.double(), scale.double(), shift.double())
    assert relative_error(gold, formula(x, scale, shift)) < 1e-13


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
    gold = formula(x, scale, shift)
    out = modulated_layer_norm(x, scale, shift)
    assert out.dtype == dtype
    assert_no_worse(out, gold.to(dtype), gold, factor=1.0)
    eager = F.layer_norm(x, (300,), eps=1e-6) * (1 + scale) + shift
    assert relative_error(out, gold) < relative_error(eager, gold)


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
