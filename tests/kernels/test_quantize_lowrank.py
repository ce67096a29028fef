"""Quantized activations and low-rank projection: the reference by its definition, the kernel by the reference."""

import pytest
import torch

from diffusers_sana.kernels import quantize_lowrank as operation
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.kept import forget
from diffusers_sana.kernels.low_bit import MAX_CODES, decode_e2m1, padded, reciprocal, unpack_nibbles
from diffusers_sana.kernels.quantize_lowrank import FORMATS, quantize_lowrank, quantize_lowrank_reference
from diffusers_sana.kernels.triton import quantize_lowrank as kernel
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.config import LayerConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLinear
from tests.kernels.kernel_checks import DEVICE, DTYPES, to_device
from tests.kernels.low_bit_checks import bits, check_compiled
from tests.numerics import assert_close_fp32


# Of the codes. On a GPU the reciprocals of scales are approximate, which decides on the edge between two codes.
MAX_FLIPPED = 0 if DEVICE == "cpu" else 1e-3


def tensors(tokens, features, rank):
    """With a row of zeros, a group of zeros and a large channel."""
    x = torch.randn(tokens, features)
    x[:, 3] *= 50
    x[-1] = 0
    x[0, -16:] = 0
    return {
        "hidden_states": x,
        "smooth_factor": torch.rand(features) + 0.5,
        "proj_down": torch.randn(rank, features),
    }


def numbers(codes, activation_format):
    """Codes as the numbers they stand for, `[M, Kp]`."""
    return decode_e2m1(unpack_nibbles(codes, 16)) if activation_format == "nvfp4" else codes.float()


def decoded(codes, scales, activation_format):
    values = numbers(codes, activation_format)
    return (values.unflatten(-1, (scales.shape[-1], -1)) * scales.float()[..., None]).flatten(-2)


@pytest.mark.parametrize("features", [64, 100])
@pytest.mark.parametrize("activation_format", FORMATS)
def test_codes_stand_for_the_smoothed_input(activation_format, features):
    given = tensors(7, features, 5)
    codes, scales, low = quantize_lowrank(**given, activation_format=activation_format)
    smoothed = given["hidden_states"] / given["smooth_factor"]
    out = decoded(codes, scales, activation_format)
    assert out.shape == (7, padded(features))
    assert (out[:, features:] == 0).all()
    # Half a step: of integers 1/2; of e2m1 the widest is 2, and a scale rounded down cuts off up to 6/16 more.
    half = 1.4 if activation_format == "nvfp4" else 0.5001
    steps = scales.float().repeat_interleave(out.shape[1] // scales.shape[1], dim=1)[:, :features]
    assert ((out[:, :features] - smoothed).abs() <= half * steps).all()
    assert_close_fp32(low, given["hidden_states"].double() @ given["proj_down"].double().t())


@pytest.mark.parametrize(("activation_format", "error"), [("int8", 0.01), ("int4", 0.12), ("nvfp4", 0.1)])
def test_error_of_the_formats(activation_format, error):
    x, ones = torch.randn(64, 512), torch.ones(512)
    codes, scales, _ = quantize_lowrank(x, ones, torch.empty(0, 512), activation_format)
    assert (decoded(codes, scales, activation_format) - x).norm() < error * x.norm()


def test_scales_of_nvfp4_saturate():
    x = torch.full((1, 64), 1e5)
    codes, scales, _ = quantize_lowrank(x, torch.ones(64), torch.empty(0, 64), "nvfp4")
    assert (decoded(codes, scales, "nvfp4") == 448 * 6).all()


def test_unknown_format():
    with pytest.raises(ValueError, match=r"`activation_format` must be one of .* got 'int3'"):
        quantize_lowrank(**tensors(1, 64, 0), activation_format="int3")


def check_kernel(given, activation_format):
    with kernel_mode("triton"):
        actual = quantize_lowrank(**given, activation_format=activation_format)
        again = quantize_lowrank(**given, activation_format=activation_format)
    expected = quantize_lowrank_reference(**given, activation_format=activation_format)
    for one, two, three in zip(actual, again, expected, strict=True):
        assert torch.equal(bits(one), bits(two))
        assert (one.shape, one.dtype) == (three.shape, three.dtype)
    ours, theirs = (numbers(out[0], activation_format) for out in (actual, expected))
    assert (ours != theirs).double().mean() <= MAX_FLIPPED
    assert torch.allclose(actual[1].float(), expected[1].float(), rtol=1e-6, atol=0)
    wider = {name: tensor.double() for name, tensor in given.items()}
    exact = quantize_lowrank_reference(**wider, activation_format=activation_format)[2]
    assert_close_fp32(actual[2], exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation_format", FORMATS)
def test_kernel(activation_format, dtype):
    check_kernel(to_device(tensors(37, 200, 32), dtype), activation_format)


@pytest.mark.parametrize("sizes", [(1, 64, 0), (3, 17, 5), (5, 320, 0), (2, 70, 150)], ids=str)
@pytest.mark.parametrize("activation_format", FORMATS)
def test_kernel_of_other_sizes(activation_format, sizes):
    """A rank of 150 takes several programs."""
    check_kernel(to_device(tensors(*sizes), torch.float32), activation_format)


@pytest.mark.parametrize("activation_format", FORMATS)
def test_kernel_of_extreme_inputs(activation_format):
    """Tiny and huge rows: groups below what e4m3 holds, groups above it."""
    given = to_device(tensors(9, 128, 5), torch.float32)
    given["hidden_states"] *= torch.logspace(-40, 6, 9, dtype=torch.float64, device=DEVICE).float()[:, None]
    given["hidden_states"][0] = 0  # what is denormal a GPU may flush
    check_kernel(given, activation_format)


@pytest.mark.parametrize("activation_format", FORMATS)
def test_kernel_with_the_blocks_of_many_tokens(activation_format, monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 1)
    check_kernel(to_device(tensors(37, 100, 5), torch.float16), activation_format)


def test_reciprocals_are_kept_until_the_factors_change():
    given = to_device(tensors(3, 64, 5), torch.float32)
    smooth = given["smooth_factor"]

    def kept():
        check_kernel(given, "int8")
        return operation._RECIPROCALS.get(None, smooth)

    first = kept()
    assert kept() is first
    smooth.mul_(3)
    assert torch.allclose(3 * kept(), first)
    forget(smooth)
    assert smooth not in operation._RECIPROCALS


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize(
    ("activation_format", "smooth", "x", "by_reciprocal", "by_division"),
    [
        ("int4", 0.9962565898895264, 3.4868979454040527, 4, 3),
        ("int8", 0.9962565898895264, 3.4868979454040527, 4, 3),
        ("nvfp4", 0.8790896534919739, 0.6593171954154968, 1.0, 0.5),
    ],
)
def test_smoothing_multiplies_by_the_reciprocal(activation_format, smooth, x, by_reciprocal, by_division, mode):
    """By which some numbers between two codes get another one than by a division. The scale of the group is 1."""
    given = to_device(tensors(1, 64, 0), torch.float32)
    given["hidden_states"].zero_()[0, :2] = torch.tensor([x, MAX_CODES[activation_format]])
    given["smooth_factor"].fill_(1)[0] = smooth

    def first():
        with kernel_mode(mode):
            codes, scales, _ = quantize_lowrank(**given, activation_format=activation_format)
        assert scales.flatten()[0] == 1
        return numbers(codes, activation_format)[0, 0].item()

    assert first() == by_reciprocal
    given["hidden_states"][0, 0] = (given["hidden_states"] / given["smooth_factor"])[0, 0]
    given["smooth_factor"].fill_(1)
    assert first() == by_division


@torch.inference_mode()
def test_a_layer_that_changes_forgets_its_reciprocals():
    """Tensors of `torch.inference_mode` do not say that they have changed."""
    (weight,), _ = decompose([torch.randn(8, 64)], LayerConfig("int4", 4, smoothing="none"))
    layer = SVDQuantLinear(weight)
    for change in (layer.half, lambda: layer.load_state_dict(layer.state_dict())):
        operation._RECIPROCALS.get(reciprocal, layer.smooth_factor)
        change()
        assert layer.smooth_factor not in operation._RECIPROCALS


def test_kernel_with_mixed_dtypes_and_strides():
    given = to_device(tensors(12, 96, 7), torch.float16)
    given |= {"hidden_states": given["hidden_states"][::3], "smooth_factor": given["smooth_factor"].float()}
    check_kernel(given, "int4")
    check_kernel(given | {"hidden_states": given["hidden_states"].t().contiguous().t()}, "int8")
    check_kernel(given | {"proj_down": given["proj_down"].float()}, "nvfp4")


def test_kernel_has_no_backward():
    """An error, not a gradient that is silently missing."""
    given = to_device(tensors(3, 64, 5), torch.float32)
    given["hidden_states"].requires_grad_()
    with kernel_mode("triton"):
        _, _, low = quantize_lowrank(**given, activation_format="int8")
    with pytest.raises(RuntimeError, match="the kernel `quantize_lowrank_forward` has no backward pass"):
        low.sum().backward()


def test_no_tokens():
    given = to_device(tensors(1, 64, 5), torch.float32)
    given["hidden_states"] = given["hidden_states"][:0]
    assert [out.shape[0] for out in quantize_lowrank(**given, activation_format="int8")] == [0, 0, 0]


@pytest.mark.parametrize("activation_format", FORMATS)
def test_kernel_is_an_operator(activation_format):
    check_compiled(quantize_lowrank, to_device(tensors(3, 100, 5), torch.float32), activation_format=activation_format)
