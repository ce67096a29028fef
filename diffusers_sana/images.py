"""The one way in which images are read and converted: files, PIL images, arrays, tensors; in training and inference.

Legend: N images, c color channels, H W height and width in pixels.

- The EXIF orientation of an image is applied.
- Integers of 8 and 16 bits span black to white; floats are in [0, 1]. Where the scale cannot be told, it is an error.
- Transparent pixels are laid over white, as `transformers.image_transforms.convert_to_rgb` does; in masks over black,
  so that nothing is masked there.
- Masks may also hold 0 and 1 in any integer type, as segmentation models return them.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.ImageFile import ImageFile
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.files import PathLike


logger = logging.getLogger(__name__)

MASK_THRESHOLD = 0.5  # mask values from here on are to be repainted
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
TEXT_CHUNKS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # of PNG; they may hold EXIF data


def max_pixels() -> float:
    """The largest number of pixels that is decoded: 1.5 times `PIL.Image.MAX_IMAGE_PIXELS`, by default 134 million.

    PIL itself warns above 1 times and refuses above 2 times that number.
    """
    return np.inf if Image.MAX_IMAGE_PIXELS is None else 1.5 * Image.MAX_IMAGE_PIXELS


def open_image(source: PathLike | BinaryIO, name: str = "") -> Image.Image:
    """An image file, decoded and upright, in its own mode.

    Args:
        source: a path, or a binary file.
        name: of the image, for errors; default: the path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, it is damaged, or it has more than `max_pixels()`; the message names the file.
    """
    with _opened(source, name) as image:
        image.load()
        return upright(image)


def read_image(source: PathLike | BinaryIO, name: str = "") -> Image.Image:
    """An image file in RGB, upright. Arguments and errors are those of `open_image`."""
    return to_rgb(open_image(source, name), name or _name(source))


def image_size(source: PathLike | BinaryIO, name: str = "") -> tuple[int, int]:
    """Height and width of the upright image in a file, from its header. See `open_image`."""
    with _opened(source, name) as image:
        if image.format == "TIFF" or (image.format == "PNG" and _has_text_after_pixels(image)):
            whole = upright(image)  # PIL knows the orientation, or applies it, only when it has read all
            return whole.height, whole.width
        is_sideways = _orientation(image, Image.Image.getexif) in SIDEWAYS
        return (image.width, image.height) if is_sideways else (image.height, image.width)


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, which is then removed; the same image if there is none."""
    if _orientation(image, type(image).getexif) == 1:
        return image
    if not isinstance(image, ImageFile):
        logger.warning(
            "An image is turned upright as its EXIF orientation says. If it was turned already, remove the orientation"
            " with `PIL.ImageOps.exif_transpose` instead."
        )
    return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """A PIL image of any mode in RGB with 8 bits, upright, transparent pixels over white.

    Args:
        image: of any mode.
        name: of the image, for errors.

    Raises:
        ValueError: it has numbers whose scale cannot be told.
    """
    image = _loaded(image, name)
    values = _deep_values(image, name)
    if values is not None:
        image = Image.fromarray((values * 255 + 0.5).astype(np.uint8))
    return _converted(image, "RGB", "white")


def to_pixels(name: str, image: Any, channels: int = 3) -> Tensor:
    """An image, or a batch of them, as a tensor.

    Args:
        name: of the argument, for errors.
        image: a PIL image; an array `[H, W]`, `[H, W, c]` or `[N, H, W, c]`; a tensor `[H, W]`, `[c, H, W]` or
            `[N, c, H, W]`. Arrays and tensors hold floats in [0, 1], integers of 8 or 16 bits without sign, or
            booleans. For masks three axes may also be `[N, H, W]`, and other integers may be 0 and 1, or 0 and 255.
        channels: c of the result, 3 for images and 1 for masks; gray images become color.

    Returns:
        `[N, c, H, W]` in fp32. Floats that were not in [0, 1] are as they were.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(image, Image.Image):
        image = _array(image, name, channels)
    if not isinstance(image, np.ndarray | Tensor):
        raise TypeError(f"`{name}` must be PIL images, arrays or tensors, one or a list, got {type(image).__name__}.")
    if 0 in image.shape:
        raise ValueError(f"`{name}` must have pixels, got an empty {type(image).__name__} {list(image.shape)}.")
    if isinstance(image, np.ndarray):
        values = torch.from_numpy(image.astype(image.dtype.newbyteorder("=")))  # copied: it may be read-only
        values = _laid_out(name, values, channels, channels_last=True)
    else:
        values = _laid_out(name, image, channels, channels_last=False)
    return _scaled(name, values, is_mask=channels == 1).expand(-1, channels, -1, -1)


def check_masks(name: str, masks: Tensor) -> None:
    """Warns of masks `[N, 1, H, W]` in which nothing is masked."""
    largest = masks.flatten(1).amax(dim=1)
    if bool((largest < MASK_THRESHOLD).any()):
        logger.warning(
            f"`{name}` masks nothing, so nothing will be repainted: its largest value is {largest.min():.3g}, and"
            f" pixels are masked from {MASK_THRESHOLD} on, on a scale from 0 to 1."
        )


def _name(source: PathLike | BinaryIO) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else "the image"


@contextmanager
def _opened(source: PathLike | BinaryIO, name: str) -> Iterator[ImageFile]:
    """An open image whose pixels are not read yet; errors of the block name it too."""
    name = name or _name(source)
    try:
        with Image.open(source) as image:  # type: ignore[arg-type]
            if image.width * image.height > max_pixels():
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name!r} must have at most {max_pixels() / 1e6:.0f} million pixels, but: {error}. Scale it down, or"
            " raise `PIL.Image.MAX_IMAGE_PIXELS`, which the limit follows, if you trust the file."
        ) from error
    except Exception as error:  # PIL raises whatever its parsers stumble over
        if isinstance(error, OSError) and error.errno is not None:
            raise  # it is about the file, which it names
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name!r} cannot be read as an image: {reason}. Replace or remove it.") from error


def _orientation(image: Image.Image, getexif: Any) -> int:
    try:
        found = getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # as above
        logger.warning(f"The EXIF data of an image cannot be read, so it is taken as upright: {error}")
        return 1
    return found if found in range(1, 9) else 1


def _has_text_after_pixels(image: ImageFile) -> bool:
    """Whether a PNG has a chunk behind its pixels that could say how the image is turned."""
    file: Any = image.fp
    position = file.tell()
    file.seek(8)
    seen_pixels = found = False
    while not found and len(head := file.read(8)) == 8:
        found = seen_pixels and head[4:] in TEXT_CHUNKS
        seen_pixels |= head[4:] == b"IDAT"
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    file.seek(position)
    return found


def _loaded(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"`{name}` cannot be decoded: {error}. Replace the file.") from error
    return upright(image)


def _deep_values(image: Image.Image, name: str) -> np.ndarray | None:
    """`[H, W]` in [0, 1] of a PIL image with more than 8 bits a channel; None for others."""
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.float32) / 65535
    if image.mode not in ("I", "F"):
        return None
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise ValueError(f"`{name}` has floats, which must be in [0, 1], got {low:.3g} to {high:.3g}. Scale them.")
        return values
    if low < 0 or high > 65535:
        raise ValueError(f"`{name}` has integers of 32 bits, of an unknown scale, got {low} to {high}. Scale them.")
    if 0 < high <= 255 and image.format != "PNG":  # integers in a PNG are of 16 bits
        raise ValueError(
            f"`{name}` has integers of 32 bits up to {high}, which may be of 8 bits (white is 255) or of 16 (white is"
            " 65535). Convert them to bytes or to 16 bits."
        )
    return (values / 65535).astype(np.float32)


def _array(image: Image.Image, name: str, channels: int) -> np.ndarray:
    """Integers or floats `[H, W]` or `[H, W, 3]` of a PIL image."""
    image = _loaded(image, name)
    if channels == 1 and image.mode.startswith("I") and np.asarray(image).max() <= 1:
        return np.asarray(image)  # labels of a segmentation
    values = _deep_values(image, name)
    if values is not None:
        return values
    return np.array(_converted(image, "RGB", "white") if channels == 3 else _converted(image, "L", "black"))


def _converted(image: Image.Image, mode: str, background: str) -> Image.Image:
    """An image of at most 8 bits a channel in another mode, its transparent pixels over a color."""
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert(mode)


def _laid_out(name: str, values: Tensor, channels: int, channels_last: bool) -> Tensor:
    """`[N, c, H, W]`, with c of 1 or `channels`."""
    kind, shape = ("array" if channels_last else "tensor"), list(values.shape)
    axis, other = (-1, -3) if channels_last else (-3, -1)
    if values.ndim == 2:
        return values[None, None]
    if values.ndim == 3 and channels == 1:
        if values.shape[axis] == 1:
            return values.movedim(axis, 0)[None]
        if not {3, 4}.isdisjoint((values.shape[0], values.shape[-1])):
            raise ValueError(
                f"`{name}` of shape {shape} may be one mask in color or {shape[0]} masks. Give one mask as [H, W], or"
                f" several as {'[N, H, W, 1]' if channels_last else '[N, 1, H, W]'}."
            )
        return values[:, None]
    if values.ndim not in (3, 4) or values.shape[axis] not in (1, channels):
        raise ValueError(
            f"`{name}` must have {channels} color channels, in arrays as the last axis, in tensors as the one before"
            f" height and width, got {kind} {shape}."
        )
    if values.shape[axis] == values.shape[other] == 3:
        raise ValueError(
            f"`{name}` of shape {shape} may have its colors first or last. Give a PIL image, or pad or resize it to"
            " more than 3 pixels."
        )
    if channels_last:
        values = values.movedim(-1, -3)
    return values[None] if values.ndim == 3 else values


def _scaled(name: str, values: Tensor, is_mask: bool) -> Tensor:
    """In fp32: integers and booleans in [0, 1], floats as they are but finite."""
    if values.is_complex():
        raise TypeError(f"`{name}` must hold real numbers, got {values.dtype}.")
    floats = values.float()
    if values.is_floating_point():
        if not bool(floats.isfinite().all()):
            raise ValueError(f"`{name}` must be finite, but has NaN or infinite values.")
        return floats
    if values.dtype == torch.bool:
        return floats
    is_binary = bool(((floats == 0) | (floats == 1)).all())
    if is_mask and is_binary:
        return floats
    if values.dtype == torch.uint8:
        if is_binary and bool(floats.any()):
            logger.warning(f"`{name}` has bytes of 0 and 1 only, which are black on a scale to 255.")
        return floats / 255
    if values.dtype == torch.uint16:
        return floats / 65535
    if is_mask and bool(((floats == 0) | (floats == 255)).all()):
        return floats / 255
    kinds = "integers of 0 and 1, or of 0 and 255" if is_mask else "integers of 8 or 16 bits without sign"
    raise TypeError(f"`{name}` must hold floats in [0, 1], booleans or {kinds}, got {values.dtype}.")


def sobel_edges(pixel_values: Tensor) -> Tensor:
    """The edges of images, white on black; a control image that needs no other model.

    The magnitude of the gradient by Sobel's 3x3 filters, the largest over the color channels: 1 for a step between
    the darkest and the brightest value.

    Args:
        pixel_values: `[B, C, H, W]` in [-1, 1].

    Returns:
        `[B, 3, H, W]` in [-1, 1], three equal channels, as image autoencoders take them.
    """
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=pixel_values.device)
    filters = torch.stack([across, across.T])[:, None] / 8  # a step of 2, from -1 to 1, gives 1
    padded = F.pad(pixel_values.float(), (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(padded.flatten(0, 1)[:, None], filters)  # [B * C, 2, H, W]
    length = gradient.norm(dim=1).unflatten(0, pixel_values.shape[:2]).amax(dim=1, keepdim=True)
    return (length.clamp(max=1) * 2 - 1).expand(-1, 3, -1, -1)
