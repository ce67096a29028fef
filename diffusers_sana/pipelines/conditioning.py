"""Images and masks that pipelines are given: read, brought to the size that is generated, laid out by prompts.

Legend: N images, c color channels, H W height and width in pixels.
"""

import math
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.images import to_pixels
from diffusers_sana.pipelines.resolution import ASPECT_RATIO_BINS, bin_size


logger = logging.get_logger(__name__)


def read_images(name: str, images: Any, channels: int = 3) -> Tensor:
    """Images as one tensor.

    Args:
        name: of the argument, for errors.
        images: one or a list of what `diffusers_sana.images.to_pixels` takes: PIL images, arrays, tensors.
        channels: c of the result, 3 for images and 1 for masks; gray images become color.

    Returns:
        `[N, c, H, W]` in fp32, in [0, 1] if what was given is. Images with values below 0 are taken for images in
        [-1, 1], as diffusers takes them, and values beyond white are kept; with a warning.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    items = list(images) if isinstance(images, list | tuple) else [images]
    if not items:
        raise ValueError(f"`{name}` must have at least one image, got an empty list.")
    parts = [to_pixels(name, item, channels) for item in items]
    if len({part.shape[-2:] for part in parts}) > 1:
        sizes = sorted({tuple(part.shape[-2:]) for part in parts})
        raise ValueError(f"`{name}` must have images of one size, got heights and widths {sizes}. Resize them first.")
    tensor = torch.cat(parts)
    low, high = (float(bound) for bound in tensor.aminmax())
    if low >= 0 and high <= 1:
        return tensor
    found = f"`{name}` should have values in [0, 1], got {low:.3g} to {high:.3g}"
    if channels == 1 or not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{found}, which no {'mask' if channels == 1 else 'image'} has.")
    if low < 0:
        logger.warning(f"{found}. It is taken for [-1, 1]; give `image / 2 + 0.5`.")
        return tensor / 2 + 0.5
    logger.warning(f"{found}. Values above 1 are brighter than white; for bytes give integers, or `image / 255`.")
    return tensor


def trained_size(height: int, width: int, native_size: int, multiple: int) -> tuple[int, int]:
    """The size to generate at for an image of this size: trained, of its aspect ratio.

    Args:
        height, width: of the image, in pixels.
        native_size: side in pixels of the square images that the checkpoint was trained on.
        multiple: that sides must be of, in pixels.

    Returns:
        Height and width from the table of trained sizes; without one, of the native area.
    """
    if native_size in ASPECT_RATIO_BINS:
        return bin_size(height, width, native_size)
    stretch = math.sqrt(height / width)
    tall, wide = (max(1, round(native_size * factor / multiple)) * multiple for factor in (stretch, 1 / stretch))
    return tall, wide


def pad_to_ratio(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeats the pixels of the border so that images get the aspect ratio of `size`.

    Args:
        images: `[N, c, H, W]`.
        size: height and width.

    Returns:
        The area that `resize_and_crop` covers and cuts again when it brings an image of `size` to `H` and `W`.
    """
    height, width = images.shape[-2:]
    ratio = max(height / size[0], width / size[1])
    below, right = round(size[0] * ratio) - height, round(size[1] * ratio) - width
    top, left = below // 2, right // 2
    return F.pad(images, (left, right - left, top, below - top), mode="replicate")


def cover_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images `[N, c, H, W]` in [0, 1] at `size`, height and width, in their proportions; what is too much is cut."""
    ratio = max(size[0] / images.shape[-2], size[1] / images.shape[-1])
    height, width = (round(side * ratio) for side in images.shape[-2:])
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return _resize(images, (height, width))[..., top : top + size[0], left : left + size[1]]


def fit_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images `[N, c, H, W]` in [0, 1] at `size`, height and width; `resize_and_crop` is the way back."""
    return _resize(pad_to_ratio(images, size), size)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == size:
        return images
    low, high = images.aminmax()  # the interpolation overshoots at edges; what was out of [0, 1] before may stay so
    resized = F.interpolate(images, size=size, mode="bicubic", antialias=True)
    return resized.clamp(low.clamp(max=0), high.clamp(min=1))


def for_each_output(name: str, values: Tensor, num_prompts: int, num_images_per_prompt: int) -> Tensor:
    """Lays out one row for all outputs, one a prompt or one an output; the images of a prompt are neighbours.

    Args:
        name: of the argument, for errors.
        values: `[N, ...]`.

    Returns:
        `[num_prompts * num_images_per_prompt, ...]`.
    """
    num_outputs = num_prompts * num_images_per_prompt
    if len(values) == num_outputs:
        return values
    if len(values) not in (1, num_prompts):
        raise ValueError(
            f"`{name}` must have one image, or one for each of the {num_prompts} prompts, got {len(values)}."
        )
    return values.repeat_interleave(num_outputs // len(values), dim=0)
