"""The rotation of groups, and the operations on rotated layers."""

import pytest
import torch

from diffusers_sana.kernels.dequantize_weight import dequantize_weight
from diffusers_sana.kernels.low_bit import encode_weight, reciprocal, weight_scales
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank
from diffusers_sana.kernels.rotation import can_rotate, rotate, rotation_size, rotation_tensor
from tests.numerics import assert_close_fp32


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_rotate(size):
    rotation = rotation_tensor(size)
    assert rotation.dtype == torch.int8
    assert rotation.prod() % 256 == size % 256
    assert rotation_size(rotation) == rotation_size(rotation.to("meta")) == size
    matrix = rotate(torch.eye(256, dtype=torch.float64), rotation)[:size, :size]
    assert torch.equal(matrix.abs() * size**0.5, torch.ones(size, size, dtype=torch.float64))  # a Hadamard matrix
    assert torch.equal(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    assert matrix.sum(0).unique().numel() == 1  # a regular one
    x = torch.randn(3, 2, 250)
    rotated = rotate(x, rotation)
    assert rotated.shape == (3, 2, 256)
    assert_close_fp32(rotate(rotated, rotation)[..., :250], x)
    blocks = torch.nn.functional.pad(x, (0, 6)).split(size, -1)
    assert_close_fp32(rotated, torch.cat([block @ matrix.float() for block in blocks], -1))


def test_sizes():
    assert rotation_tensor().item() == 64
    assert [can_rotate(features, 256) for features in (256, 250, 320)] == [True, True, False]
    for size in (0, 1, 2, 32, 128):
        with pytest.raises(ValueError, match=f"must be a power of 4, got {size}"):
            rotation_tensor(size)


@pytest.mark.parametrize("activation_format", ["int4", "int8"])
def test_quantized_input(activation_format):
    x, smooth, down = torch.randn(5, 100), torch.rand(100) + 0.5, torch.randn(4, 100)
    rotation = rotation_tensor()
    codes, scales, low = quantize_lowrank(x, smooth, down, activation_format, rotation)
    plain = quantize_lowrank(
        rotate(x * reciprocal(smooth), rotation), torch.ones(128), down[:0].new_empty(0, 128), activation_format
    )
    assert torch.equal(codes, plain[0])
    assert torch.equal(scales, plain[1])
    assert_close_fp32(low, x @ down.t())


def test_dequantized_weight():
    weight, smooth = torch.randn(48, 100), torch.rand(100) + 0.5
    down, up = torch.randn(4, 100) * 0.1, torch.randn(48, 4) * 0.1
    rotation = rotation_tensor()
    residual = rotate((weight - up @ down) * smooth, rotation)
    scales = weight_scales(residual, "int4", torch.float32)
    qweight = encode_weight(residual, *scales)
    result = dequantize_weight(qweight, *scales, smooth, down, up, torch.float32, rotation)
    assert (result - weight).norm() < 0.13 * weight.norm()
    assert (dequantize_weight(qweight, *scales, smooth, down, up, torch.float32) - weight).norm() > weight.norm()
