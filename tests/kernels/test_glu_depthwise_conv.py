"""SiLU, depthwise convolution and gate, against the formula in float64."""

import importlib

import pytest
import torch

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.glu_depthwise_conv import glu_depthwise_conv
from tests.kernels.kernel_checks import DTYPES, check_kernel, check_operator, to_device
from tests.numerics import assert_close_fp32, assert_no_worse, relative_error


def formula(x, weight, bias=None):
    """Written out: nine shifted products."""
    x, weight = x.double(), weight.double()
    height, width, features = *x.shape[1:3], x.shape[3] // 2
    padded = torch.zeros(x.shape[0], height + 2, width + 2, x.shape[3], dtype=torch.float64)
    padded[:, 1:-1, 1:-1] = x / (1 + (-x).exp())
    out = torch.zeros_like(x) if bias is None else bias.double().expand(x.shape).clone()
    for i in range(3):
        for j in range(3):
            out += padded[:, i : i + height, j : j + width] * weight[:, 0, i, j]
    gate = out[..., features:]
    return out[..., :features] * gate / (1 + (-gate).exp())


def tensors(shape, bias=True):
    channels = shape[-1]
    return {
        "hidden_states": 2 * torch.randn(shape),
        "weight": torch.randn(channels, 1, 3, 3) / 2,
        "bias": torch.randn(channels) if bias else None,
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 6), (1, 4, 17, 200)], ids=str)
def test_equals_the_formula(shape, bias):
    x, weight, bias = tensors(shape, bias).values()
    assert_close_fp32(glu_depthwise_conv(x, weight, bias), formula(x, weight, bias))
    assert relative_error(glu_depthwise_conv(x.double(), weight, bias), formula(x, weight, bias)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    x, weight, bias = (tensor.to(dtype) for tensor in tensors((2, 9, 7, 64)).values())
    before = x.clone()
    reference = formula(x, weight, bias)
    out = glu_depthwise_conv(x, weight, bias)
    assert out.dtype == dtype
    assert torch.equal(x, before)
    assert_no_worse(out, reference.to(dtype), reference, factor=1.0)


def test_inputs_are_left_alone():
    x, weight, bias = tensors((1, 3, 3, 8)).values()
    before = x.clone()
    glu_depthwise_conv(x, weight, bias)
    assert torch.equal(x, before)


def test_strided_input():
    x, weight, bias = tensors((2, 12, 6, 8)).values()
    x = x[:, ::3].movedim(-1, 1).contiguous().movedim(1, -1)
    assert_close_fp32(glu_depthwise_conv(x, weight, bias), formula(x, weight, bias))


def test_gradients():
    inputs = [tensor.double().requires_grad_() for tensor in tensors((2, 3, 4, 6)).values()]
    assert torch.autograd.gradcheck(glu_depthwise_conv, inputs)


def test_compiles_whole():
    x, weight, bias = tensors((1, 5, 6, 8)).values()
    compiled = torch.compile(glu_depthwise_conv, fullgraph=True, backend="eager")
    assert_close_fp32(compiled(x, weight, bias), formula(x, weight, bias))


@pytest.mark.parametrize("channels", [7, 10])
def test_wrong_weight(channels):
    with pytest.raises(ValueError, match="`weight` must be"):
        glu_depthwise_conv(torch.randn(1, 3, 3, channels), torch.randn(8, 1, 3, 3), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel(dtype):
    check_kernel(glu_depthwise_conv, to_device(tensors((2, 5, 9, 14)), dtype))


def test_kernel_of_one_pixel():
    check_kernel(glu_depthwise_conv, to_device(tensors((1, 1, 1, 2)), torch.float32))


def test_kernel_of_several_blocks_of_channels_without_bias():
    check_kernel(glu_depthwise_conv, to_device(tensors((1, 2, 3, 132), bias=False), torch.float32))


def test_kernel_of_a_long_strip(monkeypatch):
    """Strips of large images are higher than those of the small ones in tests."""
    launcher = importlib.import_module("diffusers_sana.kernels.triton.glu_depthwise_conv")
    monkeypatch.setattr(launcher, "MIN_PROGRAMS", 0)
    assert launcher.strip_rows(1, 9, 4) == 16
    check_kernel(glu_depthwise_conv, to_device(tensors((1, 9, 3, 10)), torch.float32))


def test_kernel_with_mixed_dtypes_and_strides():
    given = to_device(tensors((2, 6, 3, 20)), torch.float16)
    given |= {
        "hidden_states": given["hidden_states"][:, ::2],
        "weight": given["weight"].float().movedim(0, -1).contiguous().movedim(-1, 0),
    }
    check_kernel(glu_depthwise_conv, given)


def test_kernel_at_large_inputs():
    """The exponentials of neither half overflow, alone or together."""
    given = to_device(tensors((1, 3, 3, 8)), torch.float16)
    given["hidden_states"][0, 1] = torch.tensor([-1e4, -90, 90, 1e4, -90, -1e4, 50, -90])
    given["weight"] /= 100
    check_kernel(glu_depthwise_conv, given)


def test_kernel_keeps_a_nan_to_its_neighbourhood():
    given = to_device(tensors((1, 7, 9, 6)), torch.float32)
    given["hidden_states"][0, 3, 4, 1] = torch.nan
    with kernel_mode("triton"):
        out = glu_depthwise_conv(**given)
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[0, 2:5, 3:6, 1] = True
    assert torch.equal(out.isnan(), touched)


def test_kernel_is_an_operator():
    check_operator(glu_depthwise_conv, to_device(tensors((1, 2, 3, 12)), torch.float32))
