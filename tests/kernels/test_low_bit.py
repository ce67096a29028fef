"""Codes, scales and packing of the 4-bit formats, against their definitions."""

import pytest
import torch

from diffusers_sana.kernels.low_bit import (
    E2M1,
    GROUP_SIZES,
    MAX_CODES,
    decode_e2m1,
    decode_int4,
    decode_weight,
    encode_e2m1,
    encode_int4,
    encode_weight,
    group_scales,
    pack_nibbles,
    pad_features,
    padded,
    precision_of,
    requantize_rows,
    row_scales,
    unpack_nibbles,
    weight_scales,
)
from tests.kernels.low_bit_checks import PRECISIONS, quantized_weight


@pytest.mark.parametrize("group_size", [16, 64])
def test_packing_is_planar(group_size):
    nibbles = torch.randint(0, 16, (3, 192), dtype=torch.uint8)
    packed = pack_nibbles(nibbles, group_size)
    for j in range(96):
        first = j // (group_size // 2) * group_size + j % (group_size // 2)
        assert torch.equal(packed[:, j], nibbles[:, first] + 16 * nibbles[:, first + group_size // 2])
    assert torch.equal(unpack_nibbles(packed, group_size), nibbles)


def test_padding():
    assert [padded(features) for features in (1, 64, 65, 5600)] == [64, 64, 128, 5632]
    assert torch.equal(pad_features(torch.ones(2, 65)).sum(-1), torch.tensor([65.0, 65.0]))


def test_int4_is_the_nearest_integer():
    scaled = torch.arange(-9, 9, 1 / 64)
    codes = decode_int4(encode_int4(scaled))
    grid = torch.arange(-7, 8)
    assert torch.equal((codes - scaled).abs(), (grid[:, None] - scaled).abs().amin(0))
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert decode_int4(encode_int4(halves)).tolist() == [0, 2, 2, 0, -2]


def test_int4_decodes_all_nibbles():
    assert decode_int4(torch.arange(16, dtype=torch.uint8)).tolist() == [*range(8), *range(-8, 0)]


def test_e2m1_is_the_nearest_number():
    scaled = torch.arange(-8, 8, 1 / 64)
    nibbles = encode_e2m1(scaled)
    grid = torch.tensor([*E2M1, *(-value for value in E2M1)])
    assert torch.equal((decode_e2m1(nibbles) - scaled).abs(), (grid[:, None] - scaled).abs().amin(0))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert encode_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert encode_e2m1(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]
    assert encode_e2m1(torch.tensor([float("inf"), -0.0])).tolist() == [7, 8]


def test_e2m1_decodes_all_nibbles():
    values = decode_e2m1(torch.arange(16, dtype=torch.uint8))
    assert values[:8].tolist() == list(E2M1)
    assert torch.equal(values[8:], -values[:8])
    assert values[8].signbit()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weight_scales(precision, dtype):
    weight = torch.randn(5, 128) * torch.logspace(-30, 6, 5)[:, None]
    wscales, wtscale = weight_scales(weight, precision, dtype)
    assert precision_of(wscales) == precision
    amax = weight.unflatten(-1, (-1, GROUP_SIZES.get(precision, 128))).abs().amax(-1)
    steps = {"nvfp4": 2**-4, "int8": 2**-24}  # half a step of e4m3 and of fp32
    step = steps.get(precision, torch.finfo(dtype).eps / 2)
    ratio = group_scales(wscales, wtscale) * MAX_CODES[precision] / amax
    assert (ratio - 1).abs().max() < 1.01 * step
    if wtscale is not None:
        assert wtscale.dtype == dtype
        assert (torch.frexp(wtscale.float()).mantissa == 0.5).all()
        largest = wscales.float().amax(-1)
        assert ((largest > 220) & (largest <= 448)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_stay_zeros(precision):
    parts = quantized_weight(4, 128, precision).values()
    decoded = decode_weight(*parts)
    assert (decoded[-1] == 0).all()
    assert (decoded[0, :64] == 0).all()
    assert decoded.isfinite().all()


@pytest.mark.parametrize(("precision", "error"), [("int4", 0.12), ("nvfp4", 0.1), ("int8", 0.008)])
def test_error_of_the_formats(precision, error):
    """11 %, 9.5 % and .8 % of Gaussian weights; each within half a step of its scale."""
    weight = torch.randn(64, 512)
    wscales, wtscale = weight_scales(weight, precision, torch.bfloat16)
    decoded = decode_weight(encode_weight(weight, wscales, wtscale), wscales, wtscale)
    assert (decoded - weight).norm() < error * weight.norm()
    if precision == "int4":
        steps = group_scales(wscales, wtscale)[..., None]
        difference = (decoded - weight).unflatten(-1, (-1, 64)).abs()
        assert (difference <= 0.53 * steps).all()  # the rounding of the scale may cut the largest a little


@pytest.mark.parametrize("levels", [127, 63])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_requantized_rows(precision, levels):
    parts = tuple(quantized_weight(9, 192, precision).values())
    codes, scales = requantize_rows(*parts, levels)
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= levels
    assert torch.equal(scales, row_scales(parts[1], parts[2], levels))
    decoded = decode_weight(*parts)
    difference = (codes * scales[:, None] - decoded).abs()
    assert (difference <= 0.5001 * scales[:, None]).all()
    assert (codes[-1] == 0).all()


def test_int8_rows_are_taken_as_they_are():
    """Also a -128, which others write."""
    qweight, wscales, _ = quantized_weight(9, 192, "int8").values()
    qweight[0, 0] = -128
    codes, scales = requantize_rows(qweight, wscales, None)
    assert (codes.dtype, scales.dtype, wscales.shape) == (torch.int8, torch.float32, (9,))
    assert torch.equal(codes, qweight)
    assert torch.equal(scales, wscales)
    assert torch.equal(decode_weight(qweight, wscales, None), qweight * wscales[:, None])


def test_requantized_rows_add_little_error():
    weight = torch.randn(32, 512)
    parts = weight_scales(weight, "int4", torch.bfloat16)
    qweight = encode_weight(weight, *parts)
    codes, scales = requantize_rows(qweight, *parts)
    decoded = decode_weight(qweight, *parts)
    assert (codes * scales[:, None] - decoded).norm() < 0.01 * decoded.norm()
