"""Videos to latents and back with the autoencoders of SANA-Video: Wan's, LTX-2's, or DC-AE frame by frame.

Legend: B videos, C latent channels, F frames, T latent frames, h w latent height and width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC as UpstreamAutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from diffusers_sana.checks import check_computed
from diffusers_sana.locks import exclusive
from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.pipelines.decoding import as_memory_allows, decode_latents, encode_images


WAN = (4, 8)  # frames and pixels per latent; also where there is no autoencoder to ask, as in diffusers


def compression(vae: Any) -> tuple[int, int]:
    """Frames per latent frame, but for the first one, and pixels per side of a latent cell.

    Args:
        vae: `AutoencoderKLWan`, `AutoencoderKLLTX2Video` or `AutoencoderDC`; or None.
    """
    if _is_of_images(vae):
        return 1, 2 ** (len(vae.config.encoder_block_out_channels) - 1)
    if isinstance(vae, AutoencoderKLLTX2Video):
        return vae.temporal_compression_ratio, vae.spatial_compression_ratio
    config: Any = {} if vae is None else vae.config
    return config.get("scale_factor_temporal", WAN[0]), config.get("scale_factor_spatial", WAN[1])


def _is_of_images(vae: Any) -> bool:
    return isinstance(vae, AutoencoderDC | UpstreamAutoencoderDC)


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the autoencoder's own latents, `[C, 1, 1, 1]` each, in fp32."""
    if isinstance(vae, AutoencoderKLLTX2Video):
        values: tuple[Any, Any] = (vae.latents_mean, vae.latents_std)
    else:
        values = vae.config.get("latents_mean", 0.0), vae.config.get("latents_std", 1.0)
    mean, std = (torch.as_tensor(value, dtype=torch.float32, device=latents.device) for value in values)
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


def decode_videos(
    vae: Any, latents: Tensor, scale_factor: int, progress_bar: Callable[[Sequence[Any]], Any] = iter
) -> Tensor:
    """Decodes as much at a time as the memory allows.

    Args:
        vae: whose own settings for tiling and slicing stay.
        latents: `[B, C, T, h, w]`, as the denoiser has them.
        scale_factor: pixels per side of a latent cell.
        progress_bar: see `decode_latents`.

    Returns:
        `[B, 3, F, scale_factor * h, scale_factor * w]` in [-1, 1].

    Raises:
        torch.OutOfMemoryError: even video by video and in tiles.
        ValueError: the result is not finite.
    """
    if _is_of_images(vae):
        frames = decode_latents(vae, latents.transpose(1, 2).flatten(0, 1), scale_factor, progress_bar)
        return frames.unflatten(0, (len(latents), -1)).transpose(1, 2)
    mean, std = _statistics(vae, latents)
    latents = (latents.float() * std + mean).to(vae.dtype)
    advice = (
        f"Decoding latents {list(latents.shape)} does not fit even video by video and in tiles. Free memory"
        " (`enable_model_cpu_offload()`), or take the latents (`output_type='latent'`) and decode elsewhere."
    )
    videos = as_memory_allows(vae, 0, lambda: vae.decode(latents, return_dict=False)[0], advice)
    check_computed("vae", "frames", videos, vae.dtype)
    return videos


def check_streaming(vae: Any) -> None:
    """Raises where an autoencoder cannot decode a latent frame before the next one is there.

    Raises:
        ValueError: LTX-2's decoder, for one, looks ahead.
    """
    if not _is_of_images(vae) and not isinstance(vae, AutoencoderKLWan):
        raise ValueError(
            f"`vae` must be AutoencoderKLWan or AutoencoderDC to decode a stream, got {type(vae).__name__}. Take the"
            " latents (`output_type='latent'`) and decode them as a whole."
        )


def decode_stream(vae: Any, latents: Iterable[Tensor], scale_factor: int) -> Iterator[Tensor]:
    """Decodes latent frames one by one, with the same result as `decode_videos` of all of them.

    Args:
        vae: one that passes `check_streaming`. It is not changed: the decoder's memory of earlier frames is kept here.
            Its settings for tiling and slicing have no effect.
        latents: frames `[B, C, h, w]`, as the denoiser has them.
        scale_factor: pixels per side of a latent cell.

    Returns:
        For each of them, `[B, 3, f, scale_factor * h, scale_factor * w]` in [-1, 1], with one frame for the first and
        as many as the autoencoder compresses into one for the others.

    Raises:
        ValueError: a frame is not finite.
    """
    memory: list[Any] = []
    for frame in latents:
        if _is_of_images(vae):
            yield decode_latents(vae, frame, scale_factor, iter).unsqueeze(2)
            continue
        mean, std = _statistics(vae, frame)
        with exclusive(vae):
            videos = _decode_next(vae, (frame.unsqueeze(2).float() * std + mean).to(vae.dtype), memory)
        check_computed("vae", "frames", videos, vae.dtype)
        yield videos


@apply_forward_hook
def _decode_next(vae: AutoencoderKLWan, latents: Tensor, memory: list[Any]) -> Tensor:
    """The step of `AutoencoderKLWan.decode` for one latent frame, `[B, C, 1, h, w]` to `[B, 3, f, H, W]`.

    Args:
        vae, latents: see `decode_stream`; normalized as the autoencoder has them.
        memory: what its convolutions have seen of earlier frames, empty at the beginning; changed in place.
    """
    is_first = not memory
    if is_first:
        memory += [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    videos = vae.decoder(vae.post_quant_conv(latents), feat_cache=memory, feat_idx=[0], first_chunk=is_first)
    if vae.config["patch_size"] is not None:
        videos = unpatchify(videos, patch_size=vae.config["patch_size"])
    return videos.clamp(-1, 1)


def encode_videos(vae: Any, videos: Tensor) -> Tensor:
    """Encodes as much at a time as the memory allows.

    Args:
        vae: whose own settings for tiling and slicing stay.
        videos: `[B, 3, F, height, width]` in [-1, 1], sides multiples of a latent cell's, F one more than a multiple
            of the frames of a latent frame. An image is a video of one frame.

    Returns:
        `[B, C, T, h, w]` in fp32, as the denoiser has them: the mode of the posterior.

    Raises:
        torch.OutOfMemoryError: even video by video and in tiles.
        ValueError: the result is not finite.
    """
    if _is_of_images(vae):
        latents = encode_images(vae, videos.transpose(1, 2).flatten(0, 1))
        return latents.unflatten(0, (len(videos), -1)).transpose(1, 2)
    videos = videos.to(vae.dtype)
    advice = f"Encoding videos {list(videos.shape)} does not fit even video by video and in tiles. Free memory."
    latents = as_memory_allows(vae, 0, lambda: vae.encode(videos).latent_dist.mode(), advice)
    check_computed("vae", "latents", latents, vae.dtype)
    mean, std = _statistics(vae, latents)
    return (latents.float() - mean) / std
