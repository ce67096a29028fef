"""What pipelines that begin with an image share: how far to go back into noise, and the way there.

A flow mixes image and noise as `x = (1 - σ) image + σ noise`; with `strength` s, the last share s of the steps is run,
from the σ of the first of them (SDEdit, arXiv 2108.01073).

Legend: B outputs, N images given, C latent channels, h w latent height and width.
"""

import math
from typing import Any

import torch
from diffusers.pipelines.sana.pipeline_sana import retrieve_timesteps
from torch import Tensor

from diffusers_sana.checks import check_integer
from diffusers_sana.pipelines.conditioning import (
    cover_images,
    fit_images,
    for_each_output,
    read_images,
    trained_size,
)
from diffusers_sana.pipelines.decoding import encode_images
from diffusers_sana.pipelines.request import check_latents, check_strength
from diffusers_sana.pipelines.resolution import bin_size


def check_strength_of_steps(
    strength: float, num_inference_steps: int, timesteps: list[int] | None, sigmas: list[float] | None
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


class ImageStart:
    """Part of the pipelines that begin with an image, which have the components."""

    transformer: Any
    scheduler: Any
    vae: Any
    vae_scale_factor: int
    _execution_device: Any

    def _read_image(self, image: Any, height: int | None, width: int | None) -> Tensor:
        """The images of a call, checked.

        Returns:
            `[N, 3, height, width]` in [0, 1], by default in their own size; or latents `[N, C, h, w]` as given.
        """
        if image is None:
            raise ValueError("`image` must be given, got None. Use SanaPipeline to draw without one.")
        for name, side in (("height", height), ("width", width)):
            if side is not None:
                check_integer(name, side)
        if self.is_latents(image):
            check_latents(image, "image")
            if (height, width) != (None, None):
                raise ValueError("`height` and `width` must be left out where `image` is latents, which have a size.")
            return image.float()
        images = read_images("image", image)
        if self.vae is None:
            raise ValueError("`image` must be latents, because this pipeline was made without an autoencoder.")
        return cover_images(images, (height or images.shape[-2], width or images.shape[-1]))

    def _size_of(self, images: Tensor) -> tuple[int, int]:
        """Height and width in pixels of images, or of latents when decoded."""
        scale = self.vae_scale_factor if self.is_latents(images) else 1
        return images.shape[-2] * scale, images.shape[-1] * scale

    def _generated_size(
        self, images: Tensor, latents: Tensor | None, is_chosen: bool, use_resolution_binning: bool
    ) -> tuple[int, int]:
        """The size to generate at, in pixels: that of latents, or the trained one for images.

        Args:
            images: as `_read_image` returns them.
            latents: the noise to begin with, or None.
            is_chosen: whether the user has chosen the size of the images.
            use_resolution_binning: False generates at the size of the images.
        """
        size = self._size_of(images)
        if self.is_latents(images):
            return size
        if latents is not None and not is_chosen:
            return latents.shape[-2] * self.vae_scale_factor, latents.shape[-1] * self.vae_scale_factor
        if not use_resolution_binning:
            return size
        native_size = self.transformer.config.sample_size * self.vae_scale_factor
        if is_chosen:
            return bin_size(*size, native_size)
        return trained_size(*size, native_size, self.vae_scale_factor * self.transformer.config.patch_size)

    def is_latents(self, image: Any) -> bool:
        """Whether `image` is latents `[N, C, h, w]`, which are not encoded again."""
        return isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == self.transformer.config.in_channels

    def _image_latents(self, images: Tensor, size: tuple[int, int], num_prompts: int, per_prompt: int) -> Tensor:
        """Images or latents to latents `[B, C, h, w]` in fp32, of images at `size`; each image is encoded once."""
        images = images.to(self._execution_device)
        if not self.is_latents(images):
            images = encode_images(self.vae, fit_images(images, size) * 2 - 1)
        return for_each_output("image", images, num_prompts, per_prompt)

    def _schedule(
        self,
        num_inference_steps: int,
        timesteps: list[int] | None,
        sigmas: list[float] | None,
        strength: float,
    ) -> tuple[Tensor, list[float]]:
        """Lays out the steps and has the scheduler begin where `strength` says.

        Returns:
            The timesteps that are left, n, and the n + 1 noise levels σ before, between and after them; the first is 1
            where all steps are left, because their first level stands for nothing but noise.
        """
        device = self._execution_device
        all_timesteps, num_steps = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        levels = getattr(self.scheduler, "sigmas", None)
        if levels is None or not hasattr(self.scheduler, "set_begin_index"):
            raise TypeError(
                f"`scheduler` must be a solver of flows with noise levels, such as FlowDPMSolverScheduler, got"
                f" {type(self.scheduler).__name__}."
            )
        begin = (num_steps - min(num_steps, math.ceil(_steps_left(strength, num_steps)))) * self.scheduler.order
        if begin == 0:
            return all_timesteps, [1.0, *levels[1:].tolist()]
        self.scheduler.set_begin_index(begin)
        return all_timesteps[begin:], levels[begin:].tolist()


def mix_noise(image_latents: Tensor, noise: Tensor, level: float) -> Tensor:
    """`(1 - level) image_latents + level * noise`, all `[B, C, h, w]`; at level 1 the noise, bit by bit."""
    return noise if level == 1 else torch.lerp(image_latents, noise, level)
