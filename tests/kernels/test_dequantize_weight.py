"""The matrix that a quantized layer stands for: the formula, and the kernel against it."""

import pytest
import torch

from diffusers_sana.kernels.dequantize_weight import dequantize_weight
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.low_bit import GROUP_SIZES, decode_weight, encode_weight, pad_features, weight_scales
from tests.kernels.kernel_checks import DEVICE, DTYPES
from tests.numerics import assert_kernel, relative_error


SHAPES = {"one": (1, 64, 4), "odd": (37, 100, 5), "no rank": (70, 130, 0), "wide": (130, 256, 40)}


def layer(outputs, features, rank, precision, dtype):
    """qweight, wscales, wtscale, smooth_factor, proj_down, proj_up."""
    residual = pad_features(torch.randn(outputs, features))
    wscales, wtscale = weight_scales(residual, precision, dtype)
    parts = torch.rand(features) + 0.5, torch.randn(rank, features), torch.randn(outputs, rank)
    packed = (encode_weight(residual, wscales, wtscale), wscales, wtscale)
    on_device = [None if part is None else part.to(DEVICE) for part in packed]
    return [*on_device, *(part.to(DEVICE, dtype) for part in parts)]


@pytest.mark.parametrize("precision", GROUP_SIZES)
def test_equals_the_formula(precision):
    qweight, wscales, wtscale, smooth, down, up = layer(48, 100, 8, precision, torch.float32)
    expected = (
        decode_weight(qweight, wscales, wtscale)[:, :100].double() / smooth.double() + up.double() @ down.double()
    )
    actual = dequantize_weight(qweight, wscales, wtscale, smooth, down, up, torch.float32)
    assert relative_error(actual, expected) < 1e-6
    in_half = dequantize_weight(qweight, wscales, wtscale, smooth, down, up, torch.bfloat16)
    assert torch.equal(in_half, actual.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel(shape, precision, dtype):
    tensors = layer(*shape, precision, dtype)
    with kernel_mode("triton"):
        actual, again = (dequantize_weight(*tensors, dtype) for _ in range(2))
    assert torch.equal(actual, again)
    with kernel_mode("torch"):
        assert_kernel(actual, dequantize_weight(*tensors, dtype), dequantize_weight(*tensors, torch.float64), "weight")


def test_kernel_is_an_operator():
    tensors = layer(9, 100, 4, "nvfp4", torch.float32)
    compiled = torch.compile(dequantize_weight, fullgraph=True, backend="aot_eager")
    with kernel_mode("triton"):
        assert torch.equal(compiled(*tensors, torch.float16), dequantize_weight(*tensors, torch.float16))
