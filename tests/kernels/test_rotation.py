"""The rotation of groups, and the operations on rotated layers."""

import pytest
import torch

from diffusers_sana.kernels.dequantize_weight import dequantize_weight
from diffusers_sana.kernels.low_bit import encode_weight, weight_scales
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank
from diffusers_sana.kernels.rotation import GROUP, rotate
from tests.numerics import assert_close_fp32


def test_rotate():
    matrix = rotate(torch.eye(GROUP, dtype=torch.float64))
    assert torch.equal(matrix.abs() * 8, torch.ones(GROUP, GROUP, dtype=torch.float64))  # a Hadamard matrix
    assert torch.equal(matrix @ matrix, torch.eye(GROUP, dtype=torch.float64))
    assert matrix.sum(0).unique().numel() == 1  # a regular one
    x = torch.randn(3, 2, 100)
    assert rotate(x).shape == (3, 2, 128)
    assert_close_fp32(rotate(rotate(x))[..., :100], x)
    assert_close_fp32(rotate(x)[..., :64], x[..., :64] @ matrix.float())


@pytest.mark.parametrize("activation_format", ["int4", "int8"])
def test_quantized_input(activation_format):
    x, smooth, down = torch.randn(5, 100), torch.rand(100) + 0.5, torch.randn(4, 100)
    rotation = torch.tensor(GROUP, dtype=torch.int8)
    codes, scales, low = quantize_lowrank(x, smooth, down, activation_format, rotation)
    plain = quantize_lowrank(rotate(x / smooth), torch.ones(128), down[:0].new_empty(0, 128), activation_format)
    assert torch.equal(codes, plain[0])
    assert torch.equal(scales, plain[1])
    assert_close_fp32(low, x @ down.t())


def test_dequantized_weight():
    weight, smooth = torch.randn(48, 100), torch.rand(100) + 0.5
    down, up = torch.randn(4, 100) * 0.1, torch.randn(48, 4) * 0.1
    scales = weight_scales(rotate((weight - up @ down) * smooth), "int4", torch.float32)
    qweight = encode_weight(rotate((weight - up @ down) * smooth), *scales)
    rotation = torch.tensor(GROUP, dtype=torch.int8)
    result = dequantize_weight(qweight, *scales, smooth, down, up, torch.float32, rotation)
    assert (result - weight).norm() < 0.13 * weight.norm()
    assert (dequantize_weight(qweight, *scales, smooth, down, up, torch.float32) - weight).norm() > weight.norm()
