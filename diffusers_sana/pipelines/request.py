"""The arguments that the pipelines' `__call__` share, checked before anything is computed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar, Self, cast

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.sana.pipeline_sana import retrieve_timesteps
from torch import Tensor

from diffusers_sana.checks import check_integer, check_number, check_texts
from diffusers_sana.pipelines.guidance import check_guider
from diffusers_sana.prompts.encoding import Prompts


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
IMAGES = ("images", "channels", "height", "width")
VIDEOS = ("videos", "channels", "frames", "height", "width")


@dataclass(frozen=True, kw_only=True)
class Request(Prompts):
    """The arguments that pipelines share. `SanaPipeline.__call__` says what they mean.

    Arguments that only some pipelines have stay out of it, and are passed to the steps that need them.
    """

    num_inference_steps: int
    guidance_scale: float
    height: int | None
    width: int | None
    eta: float
    generator: torch.Generator | list[torch.Generator] | None
    latents: Tensor | None
    output_type: str
    return_dict: bool
    use_resolution_binning: bool
    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: Callable[[Any, int, Tensor, dict], dict | None] | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None  # not for SANA-Sprint
    guider: Any = None  # not for SANA-Sprint, LongSANA and `SanaPAGPipeline`
    ip_adapter_image: Any = None  # not for videos
    ip_adapter_image_embeds: Sequence[Tensor] | None = None

    _latent_axes: ClassVar[tuple[str, ...]] = IMAGES
    _default_guidance_scale: ClassVar[float] = 4.5  # of the pipelines that take a guider

    @classmethod
    def collect(cls, arguments: Mapping[str, Any], *, has_vae: bool) -> Self:
        """The request among the arguments of a call, checked one by one.

        Args:
            arguments: `locals()` at the start of `__call__`; other names in it are left.
            has_vae: whether the pipeline has an autoencoder.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        request = cls.of(arguments)
        if isinstance(request.callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            names = request.callback_on_step_end.tensor_inputs
            request = replace(request, callback_on_step_end_tensor_inputs=names)
        request._check(has_vae)
        return replace(request, lora_scale=(request.attention_kwargs or {}).get("scale"))

    @property
    def is_sized(self) -> bool:
        """Whether the size of the images is asked for."""
        return (self.height, self.width) != (None, None)

    @property
    def has_image_prompt(self) -> bool:
        """Whether there are images among the prompts."""
        return self.ip_adapter_image is not None or self.ip_adapter_image_embeds is not None

    def for_images(self, count: int) -> Self:
        """The same with one prompt repeated for `count` images."""
        return replace(self, prompt=[self.prompt] * count) if isinstance(self.prompt, str) else self

    def lay_out(self, scheduler: Any, device: torch.device) -> Tensor:
        """Sets the steps of `scheduler`, and returns its timesteps."""
        schedule: Any = (self.num_inference_steps, device, self.timesteps, self.sigmas)
        return cast(Tensor, retrieve_timesteps(scheduler, *schedule)[0])

    def _check(self, has_vae: bool) -> None:
        for name in ("num_inference_steps", "num_images_per_prompt", "max_sequence_length"):
            check_integer(name, getattr(self, name))
        check_number("guidance_scale", self.guidance_scale)
        check_number("eta", self.eta)
        if self.guider is not None:
            check_guider(self.guider, self.guidance_scale, self._default_guidance_scale)
        options = self.attention_kwargs
        if not isinstance(options, dict | None):
            raise TypeError(f"`attention_kwargs` must be a dict such as {{'scale': 0.5}}, got {options!r}.")
        if options and options.get("scale") is not None:
            check_number("scale` of `attention_kwargs", options["scale"])
        for name in ("timesteps", "sigmas"):
            if getattr(self, name) is not None:
                check_numbers(name, getattr(self, name))
        if self.timesteps is not None and self.sigmas is not None:
            raise ValueError("`timesteps` and `sigmas` exclude each other; leave one out.")
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {self.output_type!r}.")
        if self.output_type != "latent" and not has_vae:
            raise ValueError("`output_type` must be 'latent', because this pipeline was made without an autoencoder.")
        if self.latents is not None:
            check_latents(self.latents, axes=self._latent_axes)


@dataclass(frozen=True, kw_only=True)
class VideoRequest(Request):
    """The arguments that pipelines of videos share. `SanaVideoPipeline.__call__` says what they mean."""

    frames: int | None
    motion_score: int | None

    _latent_axes = VIDEOS
    _default_guidance_scale = 6.0

    @classmethod
    def collect(cls, arguments: Mapping[str, Any], *, has_vae: bool) -> Self:
        """As in `Request`; the prompts end with the motion score."""
        check_integer("num_videos_per_prompt", arguments["num_videos_per_prompt"])
        arguments = {**arguments, "num_images_per_prompt": arguments["num_videos_per_prompt"]}
        request = super().collect(arguments, has_vae=has_vae)
        if request.frames is not None:
            check_integer("frames", request.frames)
        if request.motion_score is None:
            return request
        check_integer("motion_score", request.motion_score, at_least=0)
        ending = f" motion score: {request.motion_score}."
        prompt = request.prompt
        if prompt is None:
            raise ValueError("`motion_score` is text after the prompt; leave it out with `prompt_embeds`.")
        if isinstance(prompt, str):
            return replace(request, prompt=prompt + ending)
        check_texts("prompt", prompt, prompt)
        return replace(request, prompt=[text + ending for text in prompt])


class Video2Request(VideoRequest):
    """The arguments that pipelines of SANA-Video 2.0 share."""

    _default_guidance_scale = 8.0


def check_descending(name: str, values: Sequence[float], most: float, default: Sequence[float]) -> list[float]:
    """The argument `name` of few-step sampling, without a 0 at its end.

    Args:
        name, values: numbers that descend.
        most: the largest allowed.
        default: an example, for the message.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    numbers = check_numbers(name, values).tolist()
    numbers = numbers[:-1] if numbers and numbers[-1] == 0 else numbers
    is_descending = all(later < earlier for earlier, later in pairwise(numbers))
    if not numbers or not is_descending or not 0 < numbers[-1] <= numbers[0] <= most:
        raise ValueError(
            f"`{name}` must descend, be above 0 and at most {most}, as in {list(default)}, got {list(values)}."
        )
    return numbers


def check_numbers(name: str, values: Sequence[float] | Tensor) -> Tensor:
    """The argument `name` in fp64. Raises where it is not a list of numbers, or has NaN or infinite ones."""
    try:
        numbers = torch.as_tensor(values).cpu().double()  # not all devices have fp64
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"`{name}` must be a list of numbers, got {values!r}.") from None
    if numbers.ndim != 1 or not bool(numbers.isfinite().all()):
        raise ValueError(f"`{name}` must be a list of finite numbers, got {values!r}.")
    return numbers


def check_strength(strength: float) -> None:
    """Raises where `strength` is not a number above 0 and at most 1."""
    if not isinstance(strength, Real) or isinstance(strength, bool):
        raise TypeError(f"`strength` must be a number, got {strength!r}.")
    if not 0 < strength <= 1:
        raise ValueError(f"`strength` must be above 0 and at most 1, got {strength}.")


def check_latents(latents: Tensor, name: str = "latents", axes: Sequence[str] = IMAGES) -> None:
    """Raises where the argument `name`, `latents`, is not finite numbers with these axes, `[B, C, h, w]`."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise TypeError(f"`{name}` must be a floating point tensor, got {getattr(latents, 'dtype', type(latents))}.")
    if latents.ndim != len(axes) or not bool(latents.isfinite().all()):
        raise ValueError(f"`{name}` must be finite and [{', '.join(axes)}], got {list(latents.shape)}.")


def check_embeds(name: str, embeds: Tensor, mask: Tensor | None, mask_name: str, channels: int) -> None:
    """Raises where text features given by the user cannot be used; reads them, so once per call.

    Args:
        name, embeds: argument, which must be finite `[B, L, channels]`.
        mask_name, mask: argument, which must be `[B, L]`.
        channels: text width of the denoiser.
    """
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        raise TypeError(f"`{name}` must be a floating point tensor, got {getattr(embeds, 'dtype', type(embeds))}.")
    if embeds.ndim != 3 or embeds.shape[-1] != channels:
        raise ValueError(
            f"`{name}` must have the shape [prompts, tokens, {channels}] (`caption_channels` of the transformer), got"
            f" {list(embeds.shape)}."
        )
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"`{mask_name}` must be given with `{name}`, as a tensor [prompts, tokens] that is 1 at tokens."
        )
    if mask.shape != embeds.shape[:2]:
        raise ValueError(f"`{mask_name}` must have the shape {list(embeds.shape[:2])}, got {list(mask.shape)}.")
    if not bool(embeds.isfinite().all()):
        raise ValueError(f"`{name}` must be finite, but has NaN or infinite values. Run the text encoder in bfloat16.")


def check_prompts(prompts: Prompts, *, channels: int, can_encode: bool) -> None:
    """Raises where texts, or the features in their place, are wrong or contradict each other.

    Args:
        prompts: texts or features.
        channels: width of text features that the denoiser takes.
        can_encode: whether there are a tokenizer and a text encoder.
    """
    prompt, negative_prompt = prompts.prompt, prompts.negative_prompt
    prompt_embeds, negative_prompt_embeds = prompts.prompt_embeds, prompts.negative_prompt_embeds
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError(
            "Exactly one of `prompt` and `prompt_embeds` must be given, got "
            + ("neither." if prompt is None else "both.")
        )
    if negative_prompt and negative_prompt_embeds is not None:
        raise ValueError("`negative_prompt` and `negative_prompt_embeds` exclude each other; leave one out.")
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        texts = text if isinstance(text, list) else ["" if text is None else text]
        check_texts(name, texts, text)
    if isinstance(prompt, list) and not prompt:
        raise ValueError("`prompt` must have at least one text, got an empty list.")
    if prompt is not None and not can_encode:
        raise ValueError(
            "`prompt` needs a tokenizer and a text encoder, but this pipeline was made without. Give"
            " `prompt_embeds` and `prompt_attention_mask`."
        )

    num_prompts = len(prompt) if isinstance(prompt, list) else 1
    if prompt_embeds is not None:
        check_embeds("prompt_embeds", prompt_embeds, prompts.prompt_attention_mask, "prompt_attention_mask", channels)
        num_prompts = len(prompt_embeds)
    if negative_prompt_embeds is not None:
        check_embeds(
            "negative_prompt_embeds",
            negative_prompt_embeds,
            prompts.negative_prompt_attention_mask,
            "negative_prompt_attention_mask",
            channels,
        )
    for name, value in (("negative_prompt", negative_prompt), ("negative_prompt_embeds", negative_prompt_embeds)):
        if isinstance(value, list | Tensor) and len(value) not in (0, num_prompts):
            raise ValueError(f"`{name}` must have one entry for each of the {num_prompts} prompts, got {len(value)}.")
