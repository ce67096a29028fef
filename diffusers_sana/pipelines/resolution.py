"""Sizes of images and videos: the tables of the official checkpoints, and the way back to the size asked for.

Legend: B batch, H W height and width in pixels.
"""

from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN
from diffusers.pipelines.sana_video.pipeline_sana_video import ASPECT_RATIO_480_BIN, ASPECT_RATIO_720_BIN
from torch import Tensor
from torch.nn import functional as F


# Native side in pixels -> aspect ratio -> (height, width) that the checkpoints of that side were trained on.
ASPECT_RATIO_BINS = {
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
    4096: ASPECT_RATIO_4096_BIN,
}


# `sample_size` of SANA-Video's checkpoints -> the same for videos.
VIDEO_ASPECT_RATIO_BINS = {30: ASPECT_RATIO_480_BIN, 22: ASPECT_RATIO_720_BIN}
WIDE = "0.57"  # the ratio of 16:9


def bin_size(height: int, width: int, native_size: int) -> tuple[int, int]:
    """The trained size whose aspect ratio is nearest to that of `height` and `width`.

    Args:
        height, width: pixels, positive.
        native_size: side in pixels of the square images that the checkpoint was trained on.

    Returns:
        Height and width; as they came where no table exists for `native_size`.
    """
    if native_size not in ASPECT_RATIO_BINS:
        return height, width
    return PixArtImageProcessor.classify_height_width_bin(height, width, ratios=ASPECT_RATIO_BINS[native_size])


def bin_video_size(height: int, width: int, sample_size: int) -> tuple[int, int]:
    """`bin_size` for videos, by the `sample_size` of the checkpoint."""
    if sample_size not in VIDEO_ASPECT_RATIO_BINS:
        return height, width
    return PixArtImageProcessor.classify_height_width_bin(height, width, ratios=VIDEO_ASPECT_RATIO_BINS[sample_size])


def native_video_size(sample_size: int, cell: int) -> tuple[int, int]:
    """Height and width in pixels, 16:9, that a checkpoint was trained on; without a table a square.

    Args:
        sample_size: of the checkpoint.
        cell: pixels per side of a token.
    """
    height, width = VIDEO_ASPECT_RATIO_BINS.get(sample_size, {WIDE: (sample_size * cell,) * 2})[WIDE]
    return int(height), int(width)


def trained_sizes(native_size: int) -> list[tuple[int, int]]:
    """Heights and widths in pixels that a checkpoint was trained on, the square one first.

    Args:
        native_size: side in pixels of its square images.
    """
    table = ASPECT_RATIO_BINS.get(native_size, {"1.0": (native_size, native_size)})
    sizes = {(int(height), int(width)) for height, width in table.values()}
    return sorted(sizes, key=lambda size: (abs(size[0] - size[1]), size))


def resize_and_crop(image: Tensor, height: int, width: int) -> Tensor:
    """Scales images to cover `height` by `width` and crops the center.

    Args:
        image: `[B, C, H, W]`.
        height, width: pixels.

    Returns:
        `[B, C, height, width]`, exactly. For some sizes diffusers' function rounds down to a pixel short
        and then leaves one column.
    """
    if image.shape[-2:] == (height, width):
        return image
    ratio = max(height / image.shape[-2], width / image.shape[-1])
    covering = tuple(round(side * ratio) for side in image.shape[-2:])
    image = F.interpolate(image, size=covering, mode="bilinear", align_corners=False)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return image[..., top : top + height, left : left + width]
