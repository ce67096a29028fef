"""Images to latents and back, in tiles where one piece is or turns out too large.

Legend: B images, C latent channels, h w latent height and width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from diffusers_sana.checks import check_computed
from diffusers_sana.locks import exclusive
from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.models.autoencoders.exact_tiling import tiles_shown_by
from diffusers_sana.pipelines.acceleration.cuda_graphs import release_graphs


logger = logging.get_logger(__name__)

TILING_SIZE = 2048  # pixels per side from which an image in one piece outgrows common GPUs


def decode_latents(
    vae: Any, latents: Tensor, scale_factor: int, progress_bar: Callable[[Sequence[Any]], Any] = iter
) -> Tensor:
    """Decodes as much at a time as the memory allows.

    Args:
        vae: deep compression autoencoder, of either package, whose own settings for tiling and slicing stay.
        latents: `[B, C, h, w]`, as the denoiser has them.
        scale_factor: pixels of a latent cell's side.
        progress_bar: wraps the tiles, as `tqdm` does; for ours only, where there are several.

    Returns:
        `[B, 3, scale_factor * h, scale_factor * w]` in [-1, 1].

    Raises:
        torch.OutOfMemoryError: even image by image and in tiles.
        ValueError: the result is not finite.
    """
    latents = (latents / vae.config.scaling_factor).to(vae.dtype)
    size = max(latents.shape[-2:]) * scale_factor
    advice = (
        f"Decoding latents {list(latents.shape)} does not fit even image by image and in tiles. Free memory"
        " (`enable_model_cpu_offload()`), or take the latents (`output_type='latent'`) and decode elsewhere."
    )
    with tiles_shown_by(progress_bar):
        images = as_memory_allows(vae, size, lambda: vae.decode(latents, return_dict=False)[0], advice)
    check_computed("vae", "images", images, vae.dtype)
    return images


def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Encodes as much at a time as the memory allows.

    Args:
        vae: deep compression autoencoder, of either package, whose own settings for tiling and slicing stay.
        images: `[B, 3, height, width]` in [-1, 1], sides multiples of a latent cell's.

    Returns:
        `[B, C, h, w]` in fp32, as the denoiser has them.

    Raises:
        torch.OutOfMemoryError: even image by image and in tiles.
        ValueError: the result is not finite.
    """
    images = images.to(vae.dtype)
    advice = (
        f"Encoding images {list(images.shape)} does not fit even image by image and in tiles. Free memory"
        " (`enable_model_cpu_offload()`), or encode elsewhere and give the latents."
    )
    latents = as_memory_allows(vae, max(images.shape[-2:]), lambda: vae.encode(images, return_dict=False)[0], advice)
    check_computed("vae", "latents", latents, vae.dtype)
    return latents.float() * vae.config.scaling_factor


def as_memory_allows(vae: Any, size: int, run: Callable[[], Tensor], advice: str) -> Tensor:
    """`run()`, in tiles for images of large `size`; where that does not fit, again in tiles and image by image.

    Before that, it is tried again without the CUDA graphs on the device of the autoencoder, if there are any.

    Args:
        vae: whose settings for tiling and slicing are restored afterwards.
        size: longer side in pixels.
        run: calls the autoencoder.
        advice: message of the error if nothing fits.
    """
    by_need = isinstance(vae, AutoencoderDC) and size >= TILING_SIZE
    try:
        with exclusive(vae), _tiled(vae) if by_need else nullcontext():
            return run()
    except torch.OutOfMemoryError as error:
        reason = str(error)  # not the error itself: its traceback keeps the tensors alive
    if release_graphs(vae.device):
        logger.warning(f"Out of memory in the autoencoder; trying again without the CUDA graphs. {reason}")
        return as_memory_allows(vae, size, run, advice)
    logger.warning(f"Out of memory in the autoencoder; trying again image by image and in tiles. {reason}")
    try:
        with exclusive(vae), _tiled(vae, sliced=True):
            return run()
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(advice) from error


@contextmanager
def _tiled(vae: Any, sliced: bool = False) -> Iterator[None]:
    """Works in tiles, and with `sliced` image by image, for the time of the block; settings of the user stay.

    Of videos, tiles have few frames too where the autoencoder has a switch for that.
    """
    switches = ("use_slicing", "use_framewise_decoding", "use_framewise_encoding")
    before = {name: getattr(vae, name) for name in ("use_tiling", *switches) if hasattr(vae, name)}
    if not before["use_tiling"]:
        vae.enable_tiling()
    for name in before.keys() & set(switches):
        setattr(vae, name, before[name] or sliced)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
