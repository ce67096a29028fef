"""Small images of latents by a linear map, which costs nothing beside a step of the model.

A cell of a deep compression autoencoder is as large as 32 x 32 pixels, so the map gives a patch of pixels per cell,
not one. It is fitted by least squares, once per loaded autoencoder, to images that need no data: noise with the 1/f
spectrum of natural images, and overlapping discs, which have their flat parts and edges.

Legend: B images, C latent channels, h w latent height and width, P pixels of a patch's side.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


PATCH = 4
IMAGES, CELLS = 4, 8  # of each kind that the map is fitted to, and cells of their side
DISCS = 60
RIDGE = 1e-3  # of the mean square of a latent channel; keeps the map small where channels go together


@dataclass(frozen=True)
class LatentPreview:
    """A linear map from a latent cell to `P x P` pixels.

    Attributes:
        weight: `[C + 1, 3 P P]`; the last row is the offset.
    """

    weight: Tensor

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: Any) -> "LatentPreview":
        """The map of an autoencoder, in the scale of the pipeline's latents."""
        side = CELLS * vae.spatial_compression_ratio
        pixels = torch.cat([natural_noise(IMAGES, side), discs(IMAGES, side)])
        batch = pixels.to(vae.device, vae.dtype)
        latents = torch.cat([vae.encode(image[None], return_dict=False)[0] for image in batch]).double().cpu()
        latents = latents * vae.config.scaling_factor
        cells = F.pad(latents.movedim(1, -1).flatten(0, 2), (0, 1), value=1.0)  # [B h w, C + 1]
        targets = F.adaptive_avg_pool2d(pixels.double(), CELLS * PATCH)
        targets = F.pixel_unshuffle(targets, PATCH).movedim(1, -1).flatten(0, 2)  # [B h w, 3 P P]
        gram = cells.T @ cells
        gram.diagonal()[:-1].add_(RIDGE * gram.diagonal()[:-1].mean())
        return cls(torch.linalg.solve(gram, cells.T @ targets).float())

    def pixels(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]`, as the pipeline has them, to images `[B, 3, P h, P w]` in [0, 1] on the CPU."""
        cells = F.pad(latents.float().cpu().movedim(1, -1), (0, 1), value=1.0)
        return F.pixel_shuffle((cells @ self.weight).movedim(-1, 1), PATCH).div(2).add(0.5).clamp(0, 1)

    def image(self, latents: Tensor) -> Image.Image:
        """The first of the images."""
        pixels = self.pixels(latents[:1])[0].movedim(0, -1)
        return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())


def natural_noise(count: int, side: int) -> Tensor:
    """Images `[count, 3, side, side]` in [-1, 1] whose amplitudes fall with the frequency; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, side, side, generator=generator)
    rows, columns = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp(min=1 / side)
    shaped = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(side, side))
    shaped = shaped / shaped.std(dim=(1, 2, 3), keepdim=True)
    gray = shaped.mean(dim=1, keepdim=True)  # colors of neighboring pixels in an image go together
    brightness, contrast = (torch.rand(2, count, 1, 1, 1, generator=generator) * 2 - 1).unbind()
    return ((0.5 * shaped + gray) * (0.6 + 0.4 * contrast) + 0.5 * brightness).clamp(-1, 1)


def discs(count: int, side: int) -> Tensor:
    """Images `[count, 3, side, side]` in [-1, 1] of discs of random colors and sizes; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.arange(side)[:, None] / side, torch.arange(side) / side
    images = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, side, side).clone()
    for image in images:
        for _ in range(DISCS):
            row, column, chance = torch.rand(3, generator=generator)
            radius = 0.04 * (1 - 0.96 * chance) ** -0.7  # many small ones, few large ones
            inside = (rows - row).square() + (columns - column).square() < radius.square()
            image[:, inside] = torch.rand(3, 1, generator=generator)
    return images * 2 - 1


def clean_latents(pipe: Any, latents: Tensor, before: Tensor | None) -> Tensor | None:
    """An estimate of the noise-free latents `[B, C, h, w]` within a step's callback, in the scale of the end.

    Sana's flow goes from noise to the image in a straight line, so two points on it show where it leads.

    Args:
        pipe: whose callback it is.
        latents: after the step.
        before: after the step before, None at the first.

    Returns:
        None where there is nothing but noise to be seen.
    """
    scheduler = pipe.scheduler
    if "sigma_data" in scheduler.config:  # SANA-Sprint: each step ends in an image with a little noise
        return latents / scheduler.config.sigma_data
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is None or index is None:
        return latents
    last, now = (float(sigmas[i]) for i in (index - 1, index))
    if now == 0 or before is None:
        return latents if now == 0 else None
    return latents - now * (latents - before) / (now - last)
