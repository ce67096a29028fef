"""Quantization of activations and the down projection: formulas, and the kernel against them."""

import pytest
import torch

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.low_bit import decode_e2m1, unpack_nibbles
from diffusers_sana.kernels.quantize_lowrank import FORMATS, quantize_lowrank, quantize_lowrank_reference
from tests.kernels.kernel_checks import DEVICE, DTYPES
from tests.numerics import relative_error


SHAPES = {"one": (1, 64, 4), "odd": (37, 100, 5), "no rank": (5, 130, 0), "wide": (70, 192, 17)}


def tensors(tokens, features, rank, dtype=torch.float32):
    """hidden_states, smooth_factor, proj_down."""
    hidden_states = torch.randn(tokens, features) * torch.logspace(-1, 1, features)
    parts = hidden_states, torch.rand(features) + 0.1, torch.randn(rank, features)
    return [part.to(DEVICE, dtype) for part in parts]


def decoded(codes, scales):
    """The numbers that codes stand for."""
    values = decode_e2m1(unpack_nibbles(codes, 16)) if codes.dtype == torch.uint8 else codes.float()
    group_size = values.shape[1] // scales.shape[1]
    return (values.unflatten(1, (-1, group_size)) * scales.float()[..., None]).flatten(1)


@pytest.mark.parametrize(("activation_format", "limit"), [("int4", 0.15), ("nvfp4", 0.12), ("int8", 0.02)])
def test_error_of_the_formats(activation_format, limit):
    x, smooth, down = tensors(64, 200, 8)
    codes, scales, low = quantize_lowrank_reference(x, smooth, down, activation_format)
    assert relative_error(decoded(codes, scales)[:, :200], x / smooth) < limit
    assert (decoded(codes, scales)[:, 200:] == 0).all()
    assert relative_error(low, x.double() @ down.double().t()) < 1e-6


@pytest.mark.parametrize("activation_format", FORMATS)
def test_zeros_and_other_formats(activation_format):
    _, smooth, down = tensors(1, 64, 4)
    codes, scales, low = quantize_lowrank(torch.zeros(3, 64, device=DEVICE), smooth, down, activation_format)
    assert not codes.any()
    assert not scales.float().any()
    assert not low.any()
    with pytest.raises(ValueError, match="`activation_format` must be one of"):
        quantize_lowrank(torch.zeros(3, 64), smooth, down, "int2")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel(shape, activation_format, dtype):
    x, smooth, down = tensors(*shape, dtype)
    with kernel_mode("triton"):
        codes, scales, low = quantize_lowrank(x, smooth, down, activation_format)
        again = quantize_lowrank(x, smooth, down, activation_format)
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip((codes, scales, low), again, strict=True)
    )
    expected_codes, expected_scales, expected_low = quantize_lowrank_reference(x, smooth, down, activation_format)
    assert (codes.dtype, codes.shape) == (expected_codes.dtype, expected_codes.shape)
    assert (scales.dtype, scales.shape) == (expected_scales.dtype, expected_scales.shape)
    if activation_format == "nvfp4":
        codes, expected_codes = (unpack_nibbles(part, 16).to(torch.int8) for part in (codes, expected_codes))
        differing = (scales.float() != expected_scales.float()).sum()
        assert differing <= 1e-3 * scales.numel()
    else:
        assert relative_error(scales, expected_scales) < 1e-6
    # A number half way between two codes, to the last digit, may get either.
    assert (codes != expected_codes).sum() <= 2e-3 * codes.numel()
    if shape[2]:
        gold = x.double() @ down.double().t()
        assert relative_error(low, gold) <= 2 * relative_error(expected_low, gold) + 1e-6


def test_strided_tokens():
    x, smooth, down = tensors(8, 128, 4)
    strided = torch.cat([x, x], dim=1)[:, :128]
    with kernel_mode("triton"):
        for a, b in zip(
            quantize_lowrank(strided, smooth, down, "int8"), quantize_lowrank(x, smooth, down, "int8"), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("activation_format", FORMATS)
def test_kernel_is_an_operator(activation_format):
    x, smooth, down = tensors(7, 100, 4)
    compiled = torch.compile(quantize_lowrank, fullgraph=True, backend="aot_eager")
    with kernel_mode("triton"):
        expected = quantize_lowrank(x, smooth, down, activation_format)
        for a, b in zip(compiled(x, smooth, down, activation_format), expected, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
