"""Masks of images: which part to draw, which latent cells to repaint, which pixels to keep.

Legend: N masks, H W height and width in pixels, h w those in latent cells.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.images import MASK_THRESHOLD
from diffusers_sana.pipelines.conditioning import cover_images, pad_to_ratio


def masked_region(masks: Tensor, padding: int) -> tuple[slice, slice]:
    """The part of the image to draw so that all masks are in it: as square as the image allows.

    Args:
        masks: `[N, 1, H, W]`.
        padding: pixels around the masks.

    Returns:
        Rows and columns.

    Raises:
        ValueError: nothing is masked.
    """
    masked = (masks >= MASK_THRESHOLD).flatten(0, 1).any(dim=0)  # [H, W]
    if not bool(masked.any()):
        raise ValueError("`mask_image` must have white pixels with `padding_mask_crop`, which looks for them.")
    spans = []
    for axis, limit in ((1, masked.shape[0]), (0, masked.shape[1])):
        places = masked.any(dim=axis).nonzero()
        spans.append((max(0, int(places.min()) - padding), min(limit, int(places.max()) + 1 + padding), limit))
    side = max(end - start for start, end, _ in spans)
    return tuple(_widen(*span, side) for span in spans)  # type: ignore[return-value]


def _widen(start: int, end: int, limit: int, side: int) -> slice:
    """`start` to `end` made `side` wide to both sides, within 0 to `limit`."""
    side = min(side, limit)
    start = min(max(0, start - (side - (end - start)) // 2), limit - side)
    return slice(start, start + side)


def fit_masks(masks: Tensor, size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Masks at the size of the images.

    Args:
        masks: `[N, 1, H, W]`, in the proportions of `size` or of `image_size`.
        size: height and width that the images have now.
        image_size: those of the images as they were given, before they were cut to `size`.

    Raises:
        ValueError: masks of other proportions, which could be stretched or cut.
    """
    given = (masks.shape[-2], masks.shape[-1])
    if _surplus(given, size) > 0 and _surplus(given, image_size) > 0:
        raise ValueError(
            f"`mask_image` must have the proportions of `image`, which is {image_size[0]} x {image_size[1]} (height,"
            f" width), got {given[0]} x {given[1]}. Cut or stretch it, whichever is meant."
        )
    return cover_images(masks, size)


def _surplus(given: tuple[int, int], size: tuple[int, int]) -> float:
    """By how much `given`, scaled to cover `size`, is larger, apart from the rounding of either."""
    ratio = max(size[0] / given[0], size[1] / given[1])
    return max(given[0] * ratio - size[0], given[1] * ratio - size[1]) - max(1.0, ratio) - 1e-6


def mask_cells(masks: Tensor, size: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Which latent cells have a pixel to be repainted.

    Args:
        masks: `[N, 1, H, W]`.
        size: height and width of the image that is generated, in pixels.
        cells: h and w of its latents.

    Returns:
        `[N, 1, h, w]`, booleans.
    """
    return F.adaptive_max_pool2d(pad_to_ratio((masks >= MASK_THRESHOLD).float(), size), cells) > 0


def put_back(drawn: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """`drawn` where the masks are 1, `images` where they are 0, to the last bit, and a mixture between.

    Args:
        drawn, images: `[N, 3, H, W]`.
        masks: `[N, 1, H, W]`.
    """
    return torch.where(masks == 0, images, masks * drawn + (1 - masks) * images)
