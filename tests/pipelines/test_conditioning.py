"""Images on their way to the size that is generated and back."""

import pytest
import torch

from diffusers_sana.pipelines.conditioning import (
    cover_images,
    fit_images,
    for_each_output,
    pad_to_ratio,
    trained_size,
)
from diffusers_sana.pipelines.resolution import resize_and_crop
from tests.numerics import relative_error


def ramp(height, width):
    """Smooth, so that scaling loses little; each pixel tells where it is."""
    rows, columns = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    return torch.stack([rows[:, None].expand(-1, width), columns.expand(height, -1)])[None]


@pytest.mark.parametrize("size", [(100, 100), (90, 110), (110, 90), (301, 280), (64, 128)])
def test_fitted_images_come_back_where_they_were(size):
    image = ramp(*size)
    fitted = fit_images(image, (96, 96))
    assert fitted.shape[-2:] == (96, 96)
    error = (resize_and_crop(fitted, *size) - image)[..., 3:-3, 3:-3].abs().max()
    assert error < 0.005  # half a pixel in 100


def test_images_of_the_size_are_left_alone():
    image = torch.rand(1, 3, 32, 48)
    assert torch.equal(fit_images(image, (32, 48)), image)
    assert torch.equal(cover_images(image, (32, 48)), image)


def test_padding_repeats_the_border():
    padded = pad_to_ratio(ramp(60, 64), (32, 32))
    assert padded.shape[-2:] == (64, 64)
    assert torch.equal(padded[..., 2:62, :], ramp(60, 64))
    assert torch.equal(padded[..., :2, :], padded[..., 2:3, :].expand(-1, -1, 2, -1))


def test_covering_keeps_the_proportions_and_the_centre():
    covered = cover_images(ramp(100, 200), (50, 50))
    assert covered.shape[-2:] == (50, 50)
    assert relative_error(covered[0, 1, 0], torch.linspace(0.25, 0.75, 50)) < 0.01


@pytest.mark.parametrize(
    ("size", "native", "expected"),
    [
        ((300, 280), 512, (512, 480)),  # from the table
        ((4000, 3000), 1024, (1152, 896)),
        ((100, 100), 128, (128, 128)),  # of the native area
        ((300, 600), 128, (96, 192)),
        ((1, 100), 128, (32, 1280)),
    ],
)
def test_trained_size(size, native, expected):
    assert trained_size(*size, native, 32) == expected


def test_layout_by_prompts():
    values = torch.arange(2)
    assert for_each_output("image", values, 2, 3).tolist() == [0, 0, 0, 1, 1, 1]
    assert for_each_output("image", values[:1], 2, 2).tolist() == [0, 0, 0, 0]
    assert for_each_output("image", torch.arange(6), 2, 3).tolist() == list(range(6))
    with pytest.raises(ValueError, match="`image` must have one image, or one for each of the 3 prompts, got 2"):
        for_each_output("image", values, 3, 1)
