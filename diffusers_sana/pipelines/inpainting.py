"""Masks of images: which part to generate, which latent cells to repaint, which pixels to keep.

Legend: N masks, H W height and width in pixels, h w those in latent cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.images import MASK_THRESHOLD, check_masks
from diffusers_sana.pipelines.conditioning import (
    StartImage,
    cover_images,
    for_each_output,
    mix_noise,
    pad_to_ratio,
    read_images,
)
from diffusers_sana.pipelines.resolution import resize_and_crop


@dataclass(frozen=True)
class Repainting:
    """The images of a call that repaints them, and the part of them that is generated.

    Attributes:
        start: the images or latents.
        masks: `[N, 1, H, W]` at their size.
        rows, columns: of the part that is generated.
    """

    start: StartImage
    masks: Tensor
    rows: slice
    columns: slice

    @classmethod
    def read(
        cls, start: StartImage, mask_image: Any, padding_mask_crop: int | None, image_size: tuple[int, int]
    ) -> Self:
        """The arguments of `SanaInpaintPipeline`, checked.

        Args:
            start: the argument `image`, cut to the size asked for.
            mask_image, padding_mask_crop: as in `SanaInpaintPipeline`.
            image_size: height and width of the images before they were cut.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        masks = read_masks(mask_image, start.size, image_size)
        return cls(start, masks, *cropped_region(masks, padding_mask_crop, start.is_latents))

    @property
    def part(self) -> StartImage:
        """What is generated; of latents it is always all."""
        if self.start.is_latents:
            return self.start
        return replace(self.start, values=self.start.values[..., self.rows, self.columns])

    @property
    def num_images(self) -> int:
        """Images or masks, whichever are more."""
        return max(len(self.start.values), len(self.masks))

    def cells(self, size: tuple[int, int], cells: tuple[int, int], counts: Sequence[int], device: Any) -> Tensor:
        """Which latent cells are generated, `[B, 1, h, w]`.

        Args:
            size: height and width that are generated, in pixels.
            cells: h and w.
            counts: prompts, and images per prompt; B is their product.
            device: of the result.
        """
        masks = self.masks[..., self.rows, self.columns].to(device)
        return mask_cells(for_each_output("mask_image", masks, *counts), size, cells)

    def put_into_images(self, generated: Tensor, counts: Sequence[int], preserve_unmasked: bool) -> Tensor:
        """The images `[B, 3, H, W]` in [0, 1] with the generated part in them.

        Args:
            generated: decoded images `[B, 3, height, width]` in [-1, 1], of the part, at the size that was generated.
            counts: prompts, and images per prompt; B is their product.
            preserve_unmasked: as in `SanaInpaintPipeline`.
        """
        generated = (resize_and_crop(generated.float(), *self.part.size) / 2 + 0.5).clamp(0, 1)
        whole = for_each_output("image", self.start.values.to(generated.device), *counts).clone()
        if preserve_unmasked:
            masks = for_each_output("mask_image", self.masks.to(generated.device), *counts)
            generated = put_back(generated, whole[..., self.rows, self.columns], masks[..., self.rows, self.columns])
        whole[..., self.rows, self.columns] = generated
        return whole


def keep_the_rest(
    repainted: Tensor, image_latents: Tensor, noise: Tensor, levels: Sequence[float]
) -> Callable[[int, Tensor], Tensor]:
    """An `after_step` for `denoise`: what is not repainted is the image at the noise level of the step.

    Args:
        repainted: from `Repainting.cells`.
        image_latents, noise: `[B, C, h, w]`.
        levels: from `lay_out_steps`.
    """

    def after_step(step: int, latents: Tensor) -> Tensor:
        return torch.where(repainted, latents, mix_noise(image_latents, noise, levels[step + 1]))

    return after_step


def read_masks(mask_image: Any, size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """The argument `mask_image` as masks `[N, 1, height, width]` at `size`, checked.

    Args:
        mask_image: as in `SanaInpaintPipeline`.
        size, image_size: as in `fit_masks`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if mask_image is None:
        raise ValueError("`mask_image` must be given, got None. Use SanaImg2ImgPipeline to change all of `image`.")
    masks = read_images("mask_image", mask_image, channels=1)
    check_masks("mask_image", masks)
    return fit_masks(masks, size, image_size)


def cropped_region(masks: Tensor, padding_mask_crop: int | None, is_latents: bool) -> tuple[slice, slice]:
    """Rows and columns of the part to generate: all, or `masked_region`.

    Args:
        masks: `[N, 1, H, W]`.
        padding_mask_crop: as in `SanaInpaintPipeline`.
        is_latents: whether the images are latents.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if padding_mask_crop is None:
        return slice(None), slice(None)
    if not isinstance(padding_mask_crop, Integral):
        raise TypeError(f"`padding_mask_crop` must be an integer or None, got {padding_mask_crop!r}.")
    if padding_mask_crop < 0 or is_latents:
        raise ValueError(f"`padding_mask_crop` must be at least 0, and None for latents, got {padding_mask_crop}.")
    return masked_region(masks, int(padding_mask_crop))


def masked_region(masks: Tensor, padding: int) -> tuple[slice, slice]:
    """The part of the image to generate so that all masks are in it: as square as the image allows.

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


def put_back(generated: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """`generated` where the masks are 1, `images` where they are 0, to the last bit, and a mixture between.

    Args:
        generated, images: `[N, 3, H, W]`.
        masks: `[N, 1, H, W]`.
    """
    return torch.where(masks == 0, images, masks * generated + (1 - masks) * images)
