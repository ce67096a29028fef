"""Checks of what is given to a Sana pipeline: each raises, naming the argument, before anything is computed."""

from numbers import Integral, Real
from typing import Any

from torch import Tensor

from diffusers_sana.pipelines.parts.prompt_encoding import check_embeds


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_positive_integer(name: str, value: int) -> None:
    """Raises where the argument `name` is not an integer, or below 1."""
    if not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def check_options(
    *,
    guidance_scale: float,
    attention_kwargs: dict[str, Any] | None,
    timesteps: list[int] | None,
    sigmas: list[float] | None,
    output_type: str,
    has_vae: bool,
    **counts: int,
) -> None:
    """Raises where options that all pipelines share are wrong or contradict each other.

    Args:
        has_vae: whether there is an autoencoder.
        counts: options that must be integers of at least 1.
        the others: as in `SanaPipeline.__call__`.
    """
    for name, count in counts.items():
        check_positive_integer(name, count)
    if not isinstance(guidance_scale, Real):
        raise TypeError(f"`guidance_scale` must be a number, got {guidance_scale!r}.")
    if not isinstance(attention_kwargs, dict | None):
        raise TypeError(f"`attention_kwargs` must be a dict such as {{'scale': 0.5}}, got {attention_kwargs!r}.")
    if timesteps is not None and sigmas is not None:
        raise ValueError("`timesteps` and `sigmas` exclude each other; leave one out.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
    if output_type != "latent" and not has_vae:
        raise ValueError("`output_type` must be 'latent', because this pipeline was made without an autoencoder.")


def check_latents(latents: Tensor, name: str = "latents") -> None:
    """Raises where the argument `name`, `latents`, is not finite numbers `[B, C, h, w]`."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise TypeError(f"`{name}` must be a floating point tensor, got {getattr(latents, 'dtype', type(latents))}.")
    if latents.ndim != 4 or not bool(latents.isfinite().all()):
        raise ValueError(f"`{name}` must be finite and [images, channels, height, width], got {list(latents.shape)}.")


def check_prompts(
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    prompt_attention_mask: Tensor | None,
    negative_prompt_attention_mask: Tensor | None,
    *,
    channels: int,
    can_encode: bool,
) -> None:
    """Raises where texts, or the features in their place, are wrong or contradict each other.

    Args:
        channels: width of text features that the denoiser takes.
        can_encode: whether there are a tokenizer and a text encoder.
        the others: as in `SanaPipeline.__call__`.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError(
            "Exactly one of `prompt` and `prompt_embeds` must be given, got "
            + ("neither." if prompt is None else "both.")
        )
    if negative_prompt and negative_prompt_embeds is not None:
        raise ValueError("`negative_prompt` and `negative_prompt_embeds` exclude each other; leave one out.")
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        texts = text if isinstance(text, list) else ["" if text is None else text]
        if not all(isinstance(item, str) for item in texts):
            raise TypeError(f"`{name}` must be a string or a list of strings, got {text!r}.")
    if isinstance(prompt, list) and not prompt:
        raise ValueError("`prompt` must have at least one text, got an empty list.")
    if prompt is not None and not can_encode:
        raise ValueError(
            "`prompt` needs a tokenizer and a text encoder, but this pipeline was made without. Give"
            " `prompt_embeds` and `prompt_attention_mask`."
        )

    num_prompts = len(prompt) if isinstance(prompt, list) else 1
    if prompt_embeds is not None:
        check_embeds("prompt_embeds", prompt_embeds, prompt_attention_mask, "prompt_attention_mask", channels)
        num_prompts = len(prompt_embeds)
    if negative_prompt_embeds is not None:
        check_embeds(
            "negative_prompt_embeds",
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            "negative_prompt_attention_mask",
            channels,
        )
    for name, value in (("negative_prompt", negative_prompt), ("negative_prompt_embeds", negative_prompt_embeds)):
        if isinstance(value, list | Tensor) and len(value) not in (0, num_prompts):
            raise ValueError(f"`{name}` must have one entry for each of the {num_prompts} prompts, got {len(value)}.")
