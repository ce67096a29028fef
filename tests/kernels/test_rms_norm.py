"""RMS norm against its formula in float64."""

import pytest
import torch
from diffusers.models.normalization import RMSNorm

from diffusers_sana.kernels.rms_norm import rms_norm
from tests.kernels.kernel_checks import DTYPES, check_kernel, check_operator, to_device
from tests.numerics import assert_close_fp32, assert_no_worse, relative_error


SHAPES = {"vector": (63,), "one": (2, 1), "tokens": (2, 17, 100), "image": (1, 5, 7, 64)}


def formula(x, weight=None, bias=None, residual=None, eps=1e-5):
    out = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        out = out * weight.double()
    for summand in (bias, residual):
        out = out if summand is None else out + summand.double()
    return out


@pytest.mark.parametrize("options", [(), ("weight",), ("weight", "bias"), ("weight", "bias", "residual")], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula(shape, options):
    x = torch.randn(shape)
    tensors = {"weight": torch.randn(shape[-1]), "bias": torch.randn(shape[-1]), "residual": torch.randn(shape)}
    kwargs = {"weight": None} | {name: tensors[name] for name in options}
    assert_close_fp32(rms_norm(x, **kwargs), formula(x, **kwargs))
    assert relative_error(rms_norm(x.double(), **kwargs), formula(x, **kwargs)) < 1e-14


@pytest.mark.parametrize("channels", [64, 100])
def test_blocks_of_rows(channels, monkeypatch):
    """On CPUs rows are taken in blocks, each with its rows of the residual; the last block is a part of one."""
    monkeypatch.setattr("diffusers_sana.kernels.cpu.blocked.ROW_BLOCK", 8 * channels)
    x, residual = torch.randn(3, 9, channels), torch.randn(3, 9, channels)  # 27 rows
    weight, bias = torch.randn(channels), torch.randn(channels)
    with torch.no_grad():
        out = rms_norm(x, weight, bias, residual=residual)
    assert_close_fp32(out, formula(x, weight, bias, residual))


def test_epsilon():
    x, weight = torch.randn(3, 8) * 1e-3, torch.ones(8)
    assert_close_fp32(rms_norm(x, weight, eps=0.1), formula(x, weight, eps=0.1))
    assert (rms_norm(torch.zeros(2, 8), weight) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    x, weight = (torch.randn(64, 300) * 30).to(dtype), torch.randn(300).to(dtype)
    reference = formula(x, weight)
    out = rms_norm(x, weight)
    assert out.dtype == dtype
    assert_no_worse(out, reference.to(dtype), reference, factor=1.0)
    stock = RMSNorm(300, eps=1e-5).to(dtype)
    stock.weight.data.copy_(weight)
    assert relative_error(out, reference) < relative_error(stock(x), reference)


def test_fp16_squares_do_not_overflow():
    x = torch.full((1, 16), 3e4, dtype=torch.float16)
    assert_no_worse(rms_norm(x, torch.ones(16)), torch.ones(1, 16, dtype=torch.float16), torch.ones(1, 16))


def test_strided_input():
    x, weight = torch.randn(4, 30, 2, 16)[:, ::3, 1], torch.randn(16)
    assert_close_fp32(rms_norm(x, weight), formula(x, weight))


def test_gradients():
    x, weight = torch.randn(3, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    bias, residual = torch.randn(9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias, residual)]
    assert torch.autograd.gradcheck(lambda x, w, b, r: rms_norm(x, w, b, residual=r), inputs)


def test_compiles_whole():
    x, weight = torch.randn(3, 33), torch.randn(33)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="eager")
    assert_close_fp32(compiled(x, weight), formula(x, weight))


def tensors(shape):
    channels = shape[-1]
    return {
        "hidden_states": torch.randn(shape),
        "weight": torch.randn(channels),
        "bias": torch.randn(channels),
        "residual": torch.randn(shape),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 63), (63, 100), (2, 5, 7, 64), (3, 2240)], ids=str)
def test_kernel(shape, dtype):
    check_kernel(rms_norm, to_device(tensors(shape), dtype))


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("residual",), ("weight", "bias", "residual")], ids=str)
def test_kernel_with_parts_missing(missing):
    given = to_device(tensors((5, 33)), torch.float32) | dict.fromkeys(missing)
    check_kernel(rms_norm, given)


def test_kernel_with_mixed_dtypes_and_strides():
    """Weights may be fp32 beside half activations, and images channels-last views."""
    given = to_device(tensors((2, 3, 5, 16)), torch.float16)
    given |= {
        "weight": given["weight"].float(),
        "residual": given["residual"].movedim(-1, 1).contiguous().movedim(1, -1),
    }
    check_kernel(rms_norm, given)


def test_kernel_is_an_operator():
    check_operator(rms_norm, to_device(tensors((7, 40)), torch.float32))
