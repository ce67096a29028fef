"""The low-bit product: formulas, and the kernel against them."""

import pytest
import torch
from torch.nn import functional as F

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.low_bit import decode_weight
from diffusers_sana.kernels.lowbit_linear import lowbit_linear, lowbit_linear_reference
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank_reference
from tests.kernels.kernel_checks import DEVICE, DTYPES
from tests.kernels.test_dequantize_weight import layer
from tests.numerics import assert_kernel, relative_error


# The interpreter has no block-scaled product, but elsewhere than on Blackwell the kernel computes nvfp4 in fp16.
FORMATS = [("int4", "int4"), ("int4", "int8"), ("nvfp4", "nvfp4"), ("nvfp4", "int8")]
SHAPES = {"one": (1, 9, 64, 4), "odd": (37, 70, 100, 5), "no rank": (16, 33, 192, 0), "many tokens": (80, 65, 128, 32)}


def arguments(tokens, outputs, features, rank, precision, activation_format, dtype=torch.float32):
    qweight, wscales, wtscale, smooth, down, up = layer(outputs, features, rank, precision, dtype)
    x = torch.randn(tokens, features).to(DEVICE, dtype)
    codes, scales, low = quantize_lowrank_reference(x, smooth, down, activation_format)
    return codes, scales, low, qweight, wscales, wtscale, up, torch.randn(outputs).to(DEVICE, dtype)


@pytest.mark.parametrize(("precision", "activation_format"), FORMATS)
def test_approaches_the_product(precision, activation_format):
    """What is left is the rounding of the activations, and in w4a8 that of the weight to eight bits."""
    qweight, wscales, wtscale, smooth, down, up = layer(64, 256, 8, precision, torch.float32)
    x = torch.randn(128, 256, device=DEVICE)
    quantized = quantize_lowrank_reference(x, smooth, down, activation_format)
    out = lowbit_linear(*quantized, qweight, wscales, wtscale, up, activation_format=activation_format)
    exact = (x / smooth) @ decode_weight(qweight, wscales, wtscale).t() + x @ down.t() @ up.t()
    assert relative_error(out, exact) < {"int4": 0.05, "nvfp4": 0.05, "int8": 0.005}[activation_format]


@pytest.mark.parametrize(
    ("activation", "function"), [("silu", F.silu), ("gelu", lambda x: F.gelu(x, approximate="tanh"))]
)
def test_activations(activation, function):
    tensors = arguments(5, 16, 64, 4, "int4", "int8")
    plain = lowbit_linear_reference(*tensors, activation_format="int8", dtype=torch.float64)
    actual = lowbit_linear(*tensors, activation_format="int8", activation=activation)
    assert relative_error(actual, function(plain)) < 1e-5


def test_bad_arguments():
    tensors = arguments(5, 16, 64, 4, "int4", "int8")
    with pytest.raises(ValueError, match="`activation` must be one of"):
        lowbit_linear(*tensors, activation_format="int8", activation="relu")
    with pytest.raises(ValueError, match="or the weight's own format 'int4', got 'nvfp4'"):
        lowbit_linear(*tensors, activation_format="nvfp4")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("precision", "activation_format"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel(shape, precision, activation_format, dtype):
    tensors = arguments(*shape, precision, activation_format, dtype)
    with kernel_mode("triton"):
        actual, again = (lowbit_linear(*tensors, activation_format=activation_format) for _ in range(2))
    assert torch.equal(actual, again)
    eager = lowbit_linear_reference(*tensors, activation_format=activation_format)
    gold = lowbit_linear_reference(*tensors, activation_format=activation_format, dtype=torch.float64)
    assert_kernel(actual, eager, gold, "output")


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_kernel_with_activation(activation):
    *tensors, _ = arguments(17, 40, 64, 4, "int4", "int8")
    options = {"activation_format": "int8", "activation": activation}
    with kernel_mode("triton"):
        actual = lowbit_linear(*tensors, **options)
    gold = lowbit_linear_reference(*tensors, **options, dtype=torch.float64)
    assert_kernel(actual, lowbit_linear_reference(*tensors, **options), gold, "output")


def test_kernel_is_an_operator():
    tensors = arguments(7, 20, 64, 4, "nvfp4", "int8")
    compiled = torch.compile(lowbit_linear, fullgraph=True, backend="aot_eager")
    with kernel_mode("triton"):
        expected = lowbit_linear(*tensors, activation_format="int8")
        assert torch.equal(compiled(*tensors, activation_format="int8"), expected)
