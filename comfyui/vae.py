"""A deep compression autoencoder behind ComfyUI's VAE socket.

It has what ComfyUI's own nodes ask of a VAE, so VAE Decode, VAE Encode and their tiled forms run on latents of Sana.
Latents there are the autoencoder's own, not scaled for the denoiser, as ComfyUI has it for all models.

Legend: B images, C latent channels, h w latent height and width.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from . import host


class SanaVae:
    """The autoencoder of a loaded pipeline.

    Attributes:
        downscale_ratio: pixels of a latent cell's side.
        latent_channels: C.
    """

    latent_dim = 2
    output_channels = 3

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.downscale_ratio = self.upscale_ratio = vae.spatial_compression_ratio
        self.latent_channels = vae.config.latent_channels

    def decode(self, samples: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` to images `[B, H, W, 3]` in [0, 1] on the CPU."""
        return self._decode(self.vae, samples)

    def decode_tiled(
        self, samples: Tensor, tile_x: int = 16, tile_y: int = 16, overlap: int | None = None, **of_video: Any
    ) -> Tensor:
        """As `decode`, in tiles of about so many latent cells. The result is that of `decode`, whatever `overlap`."""
        return self._decode(self._tiled(tile_y * self.upscale_ratio, tile_x * self.upscale_ratio), samples)

    def encode(self, pixels: Tensor) -> Tensor:
        """Images `[B, H, W, 3]` in [0, 1] to latents `[B, C, h, w]`. What exceeds whole cells is cut."""
        return self._encode(self.vae, pixels)

    def encode_tiled(
        self, pixels: Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int | None = None, **of_video: Any
    ) -> Tensor:
        """As `encode`, in tiles of about so many pixels. The result is that of `encode`, whatever `overlap`."""
        return self._encode(self._tiled(tile_y, tile_x), pixels)

    def spacial_compression_decode(self) -> int:
        """Pixels of a latent cell's side. The spelling is ComfyUI's."""
        return self.upscale_ratio

    spacial_compression_encode = spacial_compression_decode

    def temporal_compression_decode(self) -> None:
        """None: images only."""

    def _tiled(self, height: int, width: int) -> Any:
        """The autoencoder with tiling on, around the same weights; the pipeline's own settings stay.

        Tiles that are too small for this autoencoder are of its default size.
        """
        vae = copy.copy(self.vae)
        height, width = (side // self.downscale_ratio * self.downscale_ratio for side in (height, width))
        try:
            vae.enable_tiling(height, width)
        except ValueError:  # smaller than the context that a tile needs
            vae.enable_tiling()
        return vae

    @torch.no_grad()
    def _decode(self, vae: Any, samples: Tensor) -> Tensor:
        images = vae.decode(samples.to(host.device(), vae.dtype), return_dict=False)[0]
        return images.float().div(2).add(0.5).clamp(0, 1).movedim(1, -1).cpu()

    @torch.no_grad()
    def _encode(self, vae: Any, pixels: Tensor) -> Tensor:
        images = pixels[..., :3].movedim(-1, 1) * 2 - 1
        height, width = (side // self.downscale_ratio * self.downscale_ratio for side in images.shape[-2:])
        top, left = ((whole - side) // 2 for whole, side in zip(images.shape[-2:], (height, width), strict=True))
        images = images[..., top : top + height, left : left + width]
        if images.numel() == 0:
            raise ValueError(f"`pixels` must be at least {self.downscale_ratio} wide and high, got {pixels.shape}.")
        return vae.encode(images.to(host.device(), vae.dtype), return_dict=False)[0].float().cpu()
