"""Depthwise convolution and grouped matrices, against the formula in float64."""

import importlib

import pytest
import torch

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.multiscale_projection import multiscale_projection
from diffusers_sana.models.autoencoders.autoencoder_dc import MultiscaleProjection
from tests.kernels.kernel_checks import DTYPES, check_kernel, check_operator, to_device
from tests.numerics import assert_close_fp32, assert_no_worse, relative_error


def formula(x, depthwise, pointwise):
    """Written out: shifted products, then one matrix for each group."""
    x, depthwise, pointwise = x.double(), depthwise.double(), pointwise.double()
    (batch, height, width, channels), size, group_size = x.shape, depthwise.shape[-1], pointwise.shape[1]
    pad = size // 2
    padded = torch.zeros(batch, height + 2 * pad, width + 2 * pad, channels, dtype=torch.float64)
    padded[:, pad : pad + height, pad : pad + width] = x
    mixed = torch.zeros_like(x)
    for i in range(size):
        for j in range(size):
            mixed += padded[:, i : i + height, j : j + width] * depthwise[:, 0, i, j]
    matrices = pointwise.view(-1, group_size, group_size)
    return torch.einsum("bhwgi,goi->bhwgo", mixed.unflatten(-1, (-1, group_size)), matrices).flatten(-2)


def tensors(shape, group_size=16, kernel_size=5):
    channels = shape[-1]
    return {
        "hidden_states": torch.randn(shape),
        "depthwise_weight": torch.randn(channels, 1, kernel_size, kernel_size) / kernel_size,
        "pointwise_weight": torch.randn(channels, group_size, 1, 1) / group_size**0.5,
    }


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 5, 3, 6), (1, 4, 17, 200)], ids=str)
def test_equals_the_formula(shape, kernel_size):
    given = tensors(shape, group_size=2, kernel_size=kernel_size).values()
    reference = formula(*given)
    assert_close_fp32(multiscale_projection(*given), reference)
    assert relative_error(multiscale_projection(*(tensor.double() for tensor in given)), reference) < 1e-14


def test_equals_the_module():
    """Of which a head is a group."""
    module = MultiscaleProjection(48, 3, 5)
    x = torch.randn(2, 7, 6, 48)
    out = multiscale_projection(x, module.proj_in.weight, module.proj_out.weight)
    assert_close_fp32(out, module(x.movedim(-1, 1)).movedim(1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    given = [tensor.to(dtype) for tensor in tensors((2, 9, 7, 64)).values()]
    reference = formula(*given)
    out = multiscale_projection(*given)
    assert out.dtype == dtype
    assert_no_worse(out, reference.to(dtype), reference, factor=1.0)


def test_strided_input():
    x, *weights = tensors((2, 12, 6, 32)).values()
    x = x[:, ::3].movedim(-1, 1).contiguous().movedim(1, -1)
    assert_close_fp32(multiscale_projection(x, *weights), formula(x, *weights))


def test_gradients():
    given = tensors((2, 3, 4, 6), group_size=3, kernel_size=3).values()
    assert torch.autograd.gradcheck(multiscale_projection, [tensor.double().requires_grad_() for tensor in given])


def test_compiles_whole():
    given = tensors((1, 5, 6, 32)).values()
    compiled = torch.compile(multiscale_projection, fullgraph=True, backend="eager")
    assert_close_fp32(compiled(*given), formula(*given))


@pytest.mark.parametrize(
    ("depthwise", "pointwise", "name"),
    [
        ((32, 1, 4, 4), (32, 16, 1, 1), "depthwise_weight"),
        ((16, 1, 3, 3), (32, 16, 1, 1), "depthwise_weight"),
        ((32, 1, 3, 3), (32, 12, 1, 1), "pointwise_weight"),
        ((32, 1, 3, 3), (16, 16, 1, 1), "pointwise_weight"),
    ],
    ids=str,
)
def test_wrong_weights(depthwise, pointwise, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        multiscale_projection(torch.randn(1, 3, 3, 32), torch.randn(depthwise), torch.randn(pointwise))


@pytest.mark.parametrize(("group_size", "kernel_size", "why"), [(8, 5, "groups of 8"), (16, 7, "kernel size")])
def test_what_the_kernel_refuses(group_size, kernel_size, why):
    given = tensors((1, 3, 3, 32), group_size, kernel_size)
    with kernel_mode("triton"), pytest.raises(RuntimeError, match=why):
        multiscale_projection(**given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel(dtype):
    check_kernel(multiscale_projection, to_device(tensors((2, 5, 7, 64), group_size=32), dtype))


@pytest.mark.parametrize(("group_size", "kernel_size"), [(16, 3), (64, 3), (16, 1)])
def test_kernel_of_other_sizes(group_size, kernel_size):
    given = tensors((1, 3, 6, group_size), group_size, kernel_size)
    check_kernel(multiscale_projection, to_device(given, torch.float16))


def test_kernel_of_one_pixel():
    check_kernel(multiscale_projection, to_device(tensors((1, 1, 1, 32), group_size=32), torch.float32))


def test_kernel_of_a_long_strip(monkeypatch):
    """Strips of large images are higher than those of the small ones in tests."""
    strips = importlib.import_module("diffusers_sana.kernels.triton.glu_depthwise_conv")
    monkeypatch.setattr(strips, "MIN_PROGRAMS", 0)
    assert strips.strip_rows(1, 9, 16) == 16
    check_kernel(multiscale_projection, to_device(tensors((1, 9, 2, 16), kernel_size=3), torch.float32))


@pytest.mark.parametrize("half", ["hidden_states", "weights"])
def test_kernel_with_mixed_dtypes_and_strides(half):
    """As precise as the output: the matrix product is then in fp32."""
    given = to_device(tensors((2, 6, 3, 16), kernel_size=3), torch.float32)
    given = {name: x.half() if ("weight" in name) == (half == "weights") else x for name, x in given.items()}
    given["hidden_states"] = given["hidden_states"][:, ::2]
    check_kernel(multiscale_projection, given)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_kernel_with_sums_out_of_the_range_of_fp16(scale):
    """What lies between convolution and matrix may be larger or smaller than fp16 can hold."""
    given = to_device(tensors((1, 4, 4, 16), kernel_size=3), torch.float32)
    given["depthwise_weight"] *= scale
    given["hidden_states"] *= scale
    given["pointwise_weight"] /= scale
    given = {name: tensor.half() for name, tensor in given.items()}
    check_kernel(multiscale_projection, given, backward=False)


def test_kernel_is_an_operator():
    check_operator(multiscale_projection, to_device(tensors((1, 2, 3, 16), kernel_size=3), torch.float32))
