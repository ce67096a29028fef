import pytest
import torch

from diffusers_sana.checks import check_size
from diffusers_sana.pipelines.resolution import ASPECT_RATIO_BINS, bin_size, resize_and_crop


@pytest.mark.parametrize("native", [512, 1024, 2048, 4096])
def test_tables(native):
    assert bin_size(native, native, native) == (native, native)
    assert bin_size(1080, 1920, native) == (native * 768 // 1024, native * 1344 // 1024)
    for ratio, (height, width) in ASPECT_RATIO_BINS[native].items():
        assert height % 32 == width % 32 == 0
        assert bin_size(int(height), int(width), native) == (height, width)
        assert abs(float(ratio) - height / width) < 0.01


def test_sizes_without_a_table_stay():
    assert bin_size(100, 60, 128) == (100, 60)


@pytest.mark.parametrize("size", [32, 1024])
def test_good_sizes(size):
    check_size("height", size, 32)


@pytest.mark.parametrize(
    ("size", "advice"), [(1000, "Use 992 or 1024."), (31, "Use 32."), (0, "Use 32."), (-32, "Use 32.")]
)
def test_bad_sizes(size, advice):
    with pytest.raises(ValueError, match=f"`height` must be a multiple of 32, got {size}. {advice}"):
        check_size("height", size, 32)


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (512, 984),
        (520, 944),
        (544, 848),
        (1, 1),
        (1000, 1),
        (64, 64),
    ],  # of the first three diffusers leaves an image one pixel wide
)
def test_resize_and_crop_is_exact(height, width):
    for trained in (bin_size(height, width, 1024), (64, 64)):
        assert resize_and_crop(torch.zeros(1, 1, *trained), height, width).shape == (1, 1, height, width)


def test_crops_the_centre():
    row = torch.arange(8.0).expand(1, 1, 4, 8)
    assert torch.equal(resize_and_crop(row, 4, 4), row[..., 2:6])
    assert torch.equal(resize_and_crop(row, 4, 8), row)


def test_keeps_proportions():
    # A gradient over 8 columns, scaled by 2 to cover 8x8 and cut to the middle 8 of 16 columns.
    row = torch.arange(8.0).expand(1, 1, 4, 8)
    out = resize_and_crop(row, 8, 8)
    assert out.shape == (1, 1, 8, 8)
    torch.testing.assert_close(out[0, 0, 0, 1:] - out[0, 0, 0, :-1], torch.full((7,), 0.5))
