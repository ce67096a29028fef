"""The 4-bit formats against their definitions, number by number."""

import pytest
import torch

from diffusers_sana.kernels.low_bit import (
    E2M1,
    GROUP_SIZES,
    decode_e2m1,
    decode_int4,
    decode_weight,
    encode_e2m1,
    encode_int4,
    encode_weight,
    pack_nibbles,
    pad_features,
    precision_of,
    requantize_rows,
    unpack_nibbles,
    weight_scales,
)
from tests.numerics import relative_error


@pytest.mark.parametrize("group_size", GROUP_SIZES.values())
def test_packing(group_size):
    codes = torch.randint(16, (3, 128), dtype=torch.uint8)
    packed = pack_nibbles(codes, group_size)
    assert packed.shape == (3, 64)
    assert torch.equal(unpack_nibbles(packed, group_size), codes)
    for j in (0, 1, group_size // 2 - 1):  # planar: byte j of group 1 holds elements j and j + G/2
        byte = packed[2, group_size // 2 + j].item()
        assert (byte & 15, byte >> 4) == (codes[2, group_size + j].item(), codes[2, group_size * 3 // 2 + j].item())


def test_int4_codes():
    numbers = torch.tensor([-9.0, -7.4, -3.5, -2.5, -0.5, 0.0, 0.5, 1.5, 6.6, 8.0])
    assert decode_int4(encode_int4(numbers)).tolist() == [-7, -7, -4, -2, 0, 0, 0, 2, 7, 7]
    assert decode_int4(torch.tensor([8], dtype=torch.uint8)).item() == -8  # other packages write it


def test_e2m1_codes_are_the_nearest():
    numbers = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    values = torch.tensor(E2M1)
    decoded = decode_e2m1(encode_e2m1(numbers))
    best = (numbers.abs()[:, None] - values).abs().min(1).values
    assert torch.equal((decoded.abs() - numbers.abs()).abs(), best)
    assert (decoded * numbers >= 0).all()
    # half way between two codes: the one with an even index
    assert decoded[-7:].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert torch.equal(
        encode_e2m1(decode_e2m1(torch.arange(16, dtype=torch.uint8))), torch.arange(16, dtype=torch.uint8)
    )


@pytest.mark.parametrize(("precision", "limit"), [("int4", 0.12), ("nvfp4", 0.105)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_gaussian_weights(precision, limit, dtype):
    weight = pad_features(torch.randn(64, 200) * torch.logspace(-3, 2, 64)[:, None])
    wscales, wtscale = weight_scales(weight, precision, dtype)
    assert precision_of(wscales) == precision
    decoded = decode_weight(encode_weight(weight, wscales, wtscale), wscales, wtscale)
    errors = (decoded - weight).norm(dim=1) / weight.norm(dim=1)
    assert errors.max() < limit * 1.25
    assert errors.mean() < limit
    assert (decoded[:, 200:] == 0).all()


def test_row_scales_of_nvfp4_are_powers_of_two():
    """So that a checkpoint loads in any dtype; the largest group scale of a row is near the top of e4m3."""
    weight = torch.randn(32, 64) * torch.logspace(-4, 3, 32)[:, None]
    wscales, wtscale = weight_scales(weight, "nvfp4", torch.float32)
    assert (torch.frexp(wtscale).mantissa == 0.5).all()
    assert torch.equal(wtscale.half().float(), wtscale)
    largest = wscales.float().amax(1)
    assert ((largest > 200) & (largest <= 448)).all()


@pytest.mark.parametrize("precision", GROUP_SIZES)
def test_groups_of_zeros(precision):
    weight = torch.randn(4, 128)
    weight[1], weight[2, 64:] = 0, 0
    wscales, wtscale = weight_scales(weight, precision, torch.bfloat16)
    decoded = decode_weight(encode_weight(weight, wscales, wtscale), wscales, wtscale)
    assert (decoded[1] == 0).all()
    assert (decoded[2, 64:] == 0).all()
    codes, rows = requantize_rows(encode_weight(weight, wscales, wtscale), wscales, wtscale)
    assert (codes[1] == 0).all()
    assert rows.isfinite().all()


@pytest.mark.parametrize(("levels", "limit"), [(127, 0.012), (63, 0.024)])
@pytest.mark.parametrize("precision", GROUP_SIZES)
def test_rows_of_integers(precision, levels, limit):
    weight = torch.randn(64, 256)
    wscales, wtscale = weight_scales(weight, precision, torch.float32)
    packed = encode_weight(weight, wscales, wtscale)
    codes, rows = requantize_rows(packed, wscales, wtscale, levels)
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= levels
    assert relative_error(codes * rows[:, None], decode_weight(packed, wscales, wtscale)) < limit
