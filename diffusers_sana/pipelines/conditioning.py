"""Images that pipelines begin with: reading, resizing to the generated size, encoding, mixing with noise.

A flow mixes image and noise as `x = (1 - σ) image + σ noise`. With `strength` s, the last fraction s of the steps is
run, from the σ of the first of them (SDEdit, arXiv 2108.01073).

Legend: N images given, B outputs, c color channels, H W height and width in pixels, C latent channels, h w latent
height and width.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.pipelines.sana.pipeline_sana import retrieve_timesteps
from diffusers.utils import logging
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.checks import check_integer
from diffusers_sana.images import to_pixels
from diffusers_sana.pipelines.decoding import encode_images
from diffusers_sana.pipelines.request import check_latents, check_strength
from diffusers_sana.pipelines.resolution import ASPECT_RATIO_BINS, bin_size


logger = logging.get_logger(__name__)


def read_images(name: str, images: Any, channels: int = 3) -> Tensor:
    """Images as one tensor.

    Args:
        name: of the argument, for errors.
        images: one or a list of what `diffusers_sana.images.to_pixels` takes: PIL images, arrays, tensors.
        channels: c of the result, 3 for images and 1 for masks; gray images become color.

    Returns:
        `[N, c, H, W]` in fp32, in [0, 1] if what was given is. Images with values below 0 are read as images in
        [-1, 1], as in diffusers, and values beyond white are kept; with a warning.

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
        logger.warning(f"{found}. It is read as [-1, 1]; give `image / 2 + 0.5`.")
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
    """Repeats the pixels of the border so that images have the aspect ratio of `size`.

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
    """Images `[N, c, H, W]` in [0, 1] at `size`, height and width, in their proportions; the excess is cropped."""
    ratio = max(size[0] / images.shape[-2], size[1] / images.shape[-1])
    height, width = (round(side * ratio) for side in images.shape[-2:])
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return resize_images(images, (height, width))[..., top : top + size[0], left : left + size[1]]


def fit_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images `[N, c, H, W]` in [0, 1] at `size`, height and width; `resize_and_crop` is the way back."""
    return resize_images(pad_to_ratio(images, size), size)


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images `[N, c, H, W]` in [0, 1] stretched to `size`, height and width."""
    if images.shape[-2:] == size:
        return images
    low, high = images.aminmax()  # the interpolation overshoots at edges; what was out of [0, 1] before may stay so
    resized = F.interpolate(images, size=size, mode="bicubic", antialias=True)
    return resized.clamp(low.clamp(max=0), high.clamp(min=1))


def for_each_output(name: str, values: Tensor, num_prompts: int, num_images_per_prompt: int) -> Tensor:
    """Repeats one row for all outputs, or one per prompt or output; the images of a prompt are neighbors.

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


@dataclass(frozen=True)
class StartImage:
    """The images that a call begins with.

    Attributes:
        values: images `[N, 3, H, W]` in [0, 1], or latents `[N, C, h, w]`, which are not encoded again.
        is_latents: which of the two.
        scale: pixels per side of a latent cell.
    """

    values: Tensor
    is_latents: bool
    scale: int

    @classmethod
    def read(
        cls,
        image: Any,
        height: int | None,
        width: int | None,
        *,
        channels: int,
        scale: int,
        can_encode: bool,
        cover: bool = True,
        text_to_image: str = "SanaPipeline",
    ) -> Self:
        """The argument `image`, checked.

        Args:
            image: as in `SanaImg2ImgPipeline`.
            height, width: pixels that the images are cut to, in their proportions; None for those they have.
            channels: C.
            scale: pixels per side of a latent cell.
            can_encode: whether there is an autoencoder.
            cover: False leaves images in their own size.
            text_to_image: the pipeline for prompts alone, for errors.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        if image is None:
            raise ValueError(f"`image` must be given, got None. Use {text_to_image} to generate without one.")
        for name, side in (("height", height), ("width", width)):
            if side is not None:
                check_integer(name, side)
        if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == channels:
            check_latents(image, "image")
            if (height, width) != (None, None):
                raise ValueError("`height` and `width` must be left out where `image` is latents, which have a size.")
            return cls(image.float(), True, scale)
        images = read_images("image", image)
        if not can_encode:
            raise ValueError("`image` must be latents, because this pipeline was made without an autoencoder.")
        if cover:
            images = cover_images(images, (height or images.shape[-2], width or images.shape[-1]))
        return cls(images, False, scale)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, of latents when decoded."""
        scale = self.scale if self.is_latents else 1
        return self.values.shape[-2] * scale, self.values.shape[-1] * scale

    def generated_size(
        self,
        latents: Tensor | None,
        *,
        is_chosen: bool,
        use_resolution_binning: bool,
        native_size: int,
        patch_size: int,
    ) -> tuple[int, int]:
        """The size to generate at, in pixels: that of latents, or the trained one for images.

        Args:
            latents: the noise to begin with, or None.
            is_chosen: whether the user has chosen the size of the images.
            use_resolution_binning: False generates at the size of the images.
            native_size: side in pixels of the square images that the checkpoint was trained on.
            patch_size: latent cells per side of a token.
        """
        if self.is_latents:
            return self.size
        if latents is not None and not is_chosen:
            return latents.shape[-2] * self.scale, latents.shape[-1] * self.scale
        if not use_resolution_binning:
            return self.size
        if is_chosen:
            return bin_size(*self.size, native_size)
        return trained_size(*self.size, native_size, self.scale * patch_size)

    def encode(
        self, vae: Any, size: tuple[int, int], num_prompts: int, num_images_per_prompt: int, device: torch.device
    ) -> Tensor:
        """Latents `[B, C, h, w]` in fp32 of the images at `size`; each image is encoded once."""
        values = self.values.to(device)
        if not self.is_latents:
            values = encode_images(vae, fit_images(values, size) * 2 - 1)
        return for_each_output("image", values, num_prompts, num_images_per_prompt)


def check_strength_of_steps(
    strength: float, num_inference_steps: int, timesteps: Any | None, sigmas: Any | None
) -> None:
    """Raises where `strength` is not in (0, 1], or leaves less than one step of the schedule."""
    num_steps = next(len(grid) for grid in (timesteps, sigmas, range(num_inference_steps)) if grid is not None)
    check_strength(strength)
    if _steps_left(strength, num_steps) < 1:
        raise ValueError(
            f"`strength` times the number of steps must be at least 1, got {strength} * {num_steps}. Raise either."
        )


def _steps_left(strength: float, num_steps: int) -> float:
    return round(strength * num_steps, 6)  # 0.1 * 30 is a little above 3, which would be a step more


def lay_out_steps(
    scheduler: Any,
    strength: float,
    num_inference_steps: int,
    timesteps: Any | None,
    sigmas: Any | None,
    device: torch.device,
) -> tuple[Tensor, list[float]]:
    """Sets the steps of `scheduler`, and has it begin where `strength` says.

    Returns:
        The timesteps that are left, n, and the n + 1 noise levels σ before, between and after them. The first is 1
        where all steps are left, because their first level stands for nothing but noise.
    """
    all_timesteps, num_steps = retrieve_timesteps(scheduler, num_inference_steps, device, timesteps, sigmas)
    levels = getattr(scheduler, "sigmas", None)
    if levels is None or not hasattr(scheduler, "set_begin_index"):
        raise TypeError(
            f"`scheduler` must be a solver of flows with noise levels, such as FlowDPMSolverScheduler, got"
            f" {type(scheduler).__name__}."
        )
    begin = (num_steps - min(num_steps, math.ceil(_steps_left(strength, num_steps)))) * scheduler.order
    if begin == 0:
        return all_timesteps, [1.0, *levels[1:].tolist()]
    scheduler.set_begin_index(begin)
    return all_timesteps[begin:], levels[begin:].tolist()


def mix_noise(image_latents: Tensor, noise: Tensor, level: float) -> Tensor:
    """`(1 - level) image_latents + level * noise`, all `[B, C, h, w]`; at level 1 the noise, bit by bit."""
    return noise if level == 1 else torch.lerp(image_latents, noise, level)
