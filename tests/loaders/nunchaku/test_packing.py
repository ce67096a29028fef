"""Nunchaku's layouts against their index formulas, element by element."""

import pytest
import torch

from diffusers_sana.loaders.nunchaku import packing
from tests.loaders.nunchaku import nunchaku_formulas as formulas


E4M3 = torch.float8_e4m3fn
SIZES = [(1, 1), (128, 128), (200, 100), (130, 700), (300, 256)]  # (N, K)


def nibbles(*shape):
    return torch.randint(16, shape, dtype=torch.uint8)


def distinct(*shape):
    """No two elements are equal."""
    return torch.randperm(torch.tensor(shape).prod().item()).reshape(shape).double()


@pytest.mark.parametrize(
    ("n", "k", "word", "bit"),
    [
        (0, 0, 0, 0),
        (1, 0, 16, 0),
        (8, 0, 2, 0),
        (16, 0, 128, 0),
        (0, 8, 4, 0),
        (0, 32, 1, 0),
        (0, 64, 1024, 0),
        (127, 63, 1023, 28),
        (128, 0, 2048, 0),
        (37, 101, 1361, 20),
    ],
)
def test_places_of_codes(n, k, word, bit):
    """Places that were read out of real files."""
    codes = torch.zeros(256, 128, dtype=torch.uint8)
    codes[n, k] = 9
    words = packing.pack_codes(codes).view(torch.int32).flatten()
    assert words.nonzero().tolist() == [[word]]
    assert words[word].item() & 0xFFFFFFFF == 9 << bit


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_codes(rows, columns):
    codes = nibbles(rows, columns)
    packed = packing.pack_codes(codes)
    assert packed.shape == (formulas.ceil(rows, 128), formulas.ceil(columns, 128) // 2)
    assert torch.equal(packed, formulas.write_codes(codes))
    unpacked = packing.unpack_codes(packed)
    assert torch.equal(unpacked[:rows, :columns], codes)
    assert unpacked[rows:].sum() == unpacked[:, columns:].sum() == 0


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (128, 2), (200, 5), (300, 3)])
def test_scales_and_vectors(rows, groups):
    """The file has the groups of the padded K, and nothing is divided by a zero in the padding."""
    scales = distinct(rows, groups)
    packed = packing.pack_scales(scales)
    assert packed.shape == (formulas.ceil(groups, 2), formulas.ceil(rows, 128))
    assert torch.equal(packed, formulas.write_scales(formulas.pad(scales, rows, formulas.ceil(groups, 2), 1), 1))
    assert torch.equal(packing.unpack_scales(packed)[:rows, :groups], scales)
    for padding in (0, 1):
        vector = packing.pack_vector(scales[:, 0], padding)
        assert torch.equal(vector, formulas.write_vector(scales[:, 0], padding))
        assert torch.equal(packing.unpack_vector(vector)[:rows], scales[:, 0])


def test_order_of_a_vector():
    start = packing.pack_vector(torch.arange(128.0))[:16].int().tolist()
    assert start == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (128, 8), (200, 5), (300, 19)])
def test_micro_scales(rows, groups):
    scales = torch.randint(0x7F, (rows, groups), dtype=torch.uint8).view(E4M3)
    packed = packing.pack_micro_scales(scales)
    assert packed.dtype == E4M3
    assert torch.equal(packed.view(torch.uint8), formulas.write_micro_scales(scales, 1).view(torch.uint8))
    unpacked = packing.unpack_micro_scales(packed)[:rows, :groups]
    assert torch.equal(unpacked.view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.parametrize("rank", [1, 16, 20, 33])
@pytest.mark.parametrize("features", [128, 200])
def test_low_rank(features, rank):
    down = distinct(rank, features)
    packed = packing.pack_down(down)
    assert torch.equal(packed, formulas.write_down(down))
    assert torch.equal(packing.unpack_down(packed)[:rank, :features], down)
    up = distinct(features, rank)
    packed = packing.pack_up(up)
    assert torch.equal(packed, formulas.write_up(up))
    assert torch.equal(packing.unpack_up(packed)[:features, :rank], up)


@pytest.mark.parametrize(("rows", "columns"), [(4, 64), (12, 192), (100, 128)])
def test_awq(rows, columns):
    codes = nibbles(rows, columns)
    packed = packing.pack_awq(codes)
    assert packed.shape == (rows // 4, columns // 2)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, formulas.write_awq(codes))
    assert torch.equal(packing.unpack_awq(packed), codes)


@pytest.mark.parametrize(
    ("unpack", "shape", "dtype", "name"),
    [
        (packing.unpack_codes, (127, 64), torch.int8, "qweight"),
        (packing.unpack_codes, (128, 40), torch.int8, "qweight"),
        (packing.unpack_scales, (2, 127), torch.float32, "wscales"),
        (packing.unpack_vector, (127,), torch.float32, "a vector"),
        (packing.unpack_micro_scales, (3, 128), E4M3, "wscales"),
        (packing.unpack_down, (128, 20), torch.float32, "lora_down"),
        (packing.unpack_up, (120, 16), torch.float32, "lora_up"),
        (packing.unpack_awq, (1, 33), torch.int32, "qweight"),
    ],
)
def test_other_shapes_are_refused(unpack, shape, dtype, name):
    with pytest.raises(ValueError, match=f"`{name}` must be a multiple of"):
        unpack(torch.zeros(shape).to(dtype))
