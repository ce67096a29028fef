"""The CPU's w4a8 product against the formulas of the two operations it stands for."""

import pytest
import torch

from diffusers_sana.kernels.cpu import int8_linear as module
from diffusers_sana.kernels.cpu.int8_linear import forget, int8_linear, int8_linear_reference, is_prepared
from diffusers_sana.kernels.low_bit import encode_weight, pad_features, weight_scales
from tests.numerics import relative_error


pytestmark = pytest.mark.skipif(not module.is_supported(), reason="this processor has no 8-bit product in PyTorch")


def layer(outputs, features, rank, precision="int4", dtype=torch.float32):
    """qweight, wscales, wtscale, smooth_factor, proj_down, proj_up, bias, rotation."""
    residual = pad_features(torch.randn(outputs, features))
    wscales, wtscale = weight_scales(residual, precision, dtype)
    return (
        encode_weight(residual, wscales, wtscale),
        wscales,
        wtscale,
        torch.rand(features).to(dtype) + 0.5,
        torch.randn(rank, features).to(dtype),
        torch.randn(outputs, rank).to(dtype),
        torch.randn(outputs).to(dtype),
        None,
    )


@pytest.mark.parametrize("precision", ["int4", "nvfp4", "int8"])
@pytest.mark.parametrize(
    ("tokens", "outputs", "features", "rank"), [(1, 8, 64, 4), (70, 33, 100, 0), (130, 96, 320, 5)]
)
def test_equals_the_int8_linear_reference(tokens, outputs, features, rank, precision):
    tensors = layer(outputs, features, rank, precision)
    x = torch.randn(tokens, features)
    assert relative_error(int8_linear(x, *tensors), int8_linear_reference(x, *tensors)) < 1e-5
    assert torch.equal(int8_linear(x, *tensors), int8_linear(x, *tensors))


def test_without_bias():
    *tensors, _, _ = layer(16, 64, 4)
    x = torch.randn(5, 64)
    assert relative_error(int8_linear(x, *tensors, None, None), int8_linear_reference(x, *tensors, None, None)) < 1e-5


def test_rows_in_blocks_are_as_in_one(monkeypatch):
    tensors, x = layer(32, 128, 4), torch.randn(301, 128)
    whole = int8_linear(x, *tensors)
    monkeypatch.setattr(module, "BLOCK", 1)  # blocks of MIN_ROWS
    assert relative_error(int8_linear(x, *tensors), whole) < 1e-6


def test_bf16_is_rounded_once():
    tensors, x = layer(32, 128, 4, dtype=torch.bfloat16), torch.randn(9, 128).bfloat16()
    out = int8_linear(x, *tensors)
    assert out.dtype == torch.bfloat16
    expected = int8_linear_reference(x, *tensors)
    assert relative_error(out, expected) <= 1.01 * relative_error(expected.bfloat16(), expected) + 1e-5


def test_the_largest_codes_do_not_overflow():
    """Processors without VNNI add pairs of products in 16 bits."""
    features = 256
    residual = torch.ones(8, features)
    wscales, _ = weight_scales(residual, "int4", torch.float32)
    weight = encode_weight(residual, wscales, None), wscales, None
    branch = torch.zeros(0, features), torch.zeros(8, 0)
    out = int8_linear(torch.ones(4, features), *weight, torch.ones(features), *branch, None, None)
    assert torch.allclose(out, torch.full((4, 8), float(features)), rtol=1e-3)


def test_zero_rows():
    tensors = layer(8, 64, 2)
    x = torch.zeros(3, 64)
    assert torch.equal(int8_linear(x, *tensors), tensors[-2].expand(3, 8))


def test_weight_is_prepared_once_and_again_when_it_changes(monkeypatch):
    tensors, x = layer(16, 128, 4, dtype=torch.bfloat16), torch.randn(5, 128).bfloat16()
    calls, prepare = [], module.prepare
    monkeypatch.setattr(module, "prepare", lambda *parts: calls.append(parts) or prepare(*parts))
    first = int8_linear(x, *tensors)
    assert torch.equal(int8_linear(x, *tensors), first)
    assert len(calls) == 1
    qweight, wscales, *_ = tensors
    wscales.mul_(2)
    changed = int8_linear(x, *tensors)
    assert len(calls) == 2
    assert relative_error(changed, int8_linear_reference(x, *tensors)) < 1e-2 < relative_error(first, changed)
    assert is_prepared(qweight)
    forget(qweight)
    assert not is_prepared(qweight)


def test_copies_end_with_their_weights():
    tensors, x = layer(16, 128, 4), torch.randn(5, 128)
    before = len(module._PREPARED)
    int8_linear(x, *tensors)
    assert len(module._PREPARED) == before + 1
    del tensors
    assert len(module._PREPARED) == before


def test_has_no_backward_pass():
    tensors, x = layer(16, 128, 4), torch.randn(5, 128, requires_grad=True)
    with pytest.raises(RuntimeError, match="`int8_linear` has no backward pass"):
        int8_linear(x, *tensors).sum().backward()
