"""What pipelines with ControlNets add to the others: control images, and the ControlNets in each step.

Legend: P prompts, B images (prompts times images per prompt), C latent channels, h w latent height and width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from diffusers_sana.checks import check_number, check_size
from diffusers_sana.images import to_pixels, to_rgb
from diffusers_sana.locks import exclusive
from diffusers_sana.models.controlnets.controlnet_sana import control, wiring_of
from diffusers_sana.models.controlnets.multicontrolnet_sana import (
    SanaMultiControlNetModel,
    control_by_all,
    controlnets_of,
)
from diffusers_sana.pipelines.conditioning import fit_images, for_each_output, read_images, resize_images
from diffusers_sana.pipelines.decoding import encode_images
from diffusers_sana.pipelines.inpainting import Repainting
from diffusers_sana.pipelines.sampling import Denoiser, Predict, TextInputs, predict_flow


logger = logging.get_logger(__name__)


# What the transformer gets from the ControlNets, from latents `[n B, C, h, w]` and timesteps 0 to 1000 `[n B]`.
Residuals = Callable[[Denoiser, Tensor, Tensor, TextInputs], dict[str, Any]]


def as_one(controlnet: Any) -> Any:
    """The component `controlnet` of a pipeline, of one ControlNet or a list of them."""
    return SanaMultiControlNetModel(controlnet) if isinstance(controlnet, list | tuple) else controlnet


def warn_of_unused_outputs(controlnet: Any, transformer: Any) -> None:
    """Says where nothing reads the last outputs of a ControlNet: the transformer has too few blocks."""
    if controlnet is None or transformer is None:
        return
    for net in controlnets_of(controlnet):
        layers, blocks = net.config["num_layers"], transformer.config["num_layers"]
        used = blocks if wiring_of(net) == "nvlabs" else blocks - 1  # the first block is not controlled
        if layers > used:
            logger.warning(
                f"`controlnet` has {layers} layers for a transformer of {blocks}, which uses the outputs of {used}. Is"
                " it the ControlNet that was trained for this transformer?"
            )


@dataclass(frozen=True)
class Control:
    """What the ControlNets do in a call, checked. Each list has an entry for each ControlNet.

    Attributes:
        controlnet, transformer: of the pipeline.
        scales: strengths.
        starts, ends: the steps between these fractions are controlled; in the others the ControlNet does not run.
    """

    controlnet: Any
    transformer: Any
    scales: Sequence[float]
    starts: Sequence[float]
    ends: Sequence[float]

    @classmethod
    def of(
        cls,
        controlnet: Any,
        transformer: Any,
        scale: float | Sequence[float],
        start: float | Sequence[float],
        end: float | Sequence[float],
    ) -> Self:
        """From the arguments of `SanaControlNetPipeline`.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        given = {
            "controlnet_conditioning_scale": scale,
            "control_guidance_start": start,
            "control_guidance_end": end,
        }
        scales, starts, ends = (_numbers(controlnet, name, value) for name, value in given.items())
        for first, last in zip(starts, ends, strict=True):
            if not 0 <= first < last <= 1:
                raise ValueError(
                    "`control_guidance_start` and `control_guidance_end` must be fractions of the steps, the first"
                    f" below the second, got {first} and {last}."
                )
        for net in controlnets_of(controlnet):
            ours, theirs = _widths(net.config), _widths(transformer.config)
            for name in ours:
                if ours[name] != theirs[name]:
                    raise ValueError(
                        f"`controlnet` must fit `transformer`, but their `{name}` are {ours[name]} and {theirs[name]}."
                        " Load the ControlNet that was trained for this transformer."
                    )
            if wiring_of(net) == "nvlabs" and not hasattr(transformer, "encode_text"):
                raise ValueError(
                    "`controlnet` has `wiring='nvlabs'`, which the transformer of diffusers cannot run. Load the "
                    "transformer with this package."
                )
        return cls(controlnet, transformer, scales, starts, ends)

    def predictor(self, tensors: dict[str, Any], num_steps: int) -> Predict:
        """A `predict` for the denoising loop of flow matching, in which the ControlNets steer.

        Args:
            tensors, num_steps: as in `residuals`.
        """
        residuals = self.residuals(tensors, num_steps)

        def predict(model: Denoiser, latents: Tensor, t: Tensor, text: TextInputs) -> Tensor:
            stream = torch.cat([latents, latents]) if text.is_guided else latents
            return predict_flow(model, latents, t, text, **residuals(model, stream, t.expand(len(stream)), text))

        return predict

    def residuals(self, tensors: dict[str, Any], num_steps: int) -> Residuals:
        """What gives the transformer the outputs of the ControlNets as keyword arguments; none where none is active.

        Args:
            tensors: as in `denoise`, with control latents as `control_image`, of B or 2 B images; of several
                ControlNets a list.
            num_steps: of the loop.
        """
        projected: dict[TextInputs, dict[str, Any]] = {}

        def residuals(model: Denoiser, stream: Tensor, times: Tensor, text: TextInputs) -> dict[str, Any]:
            scales = self._scales_at(model.step_index, num_steps)
            if not any(scales):
                return {}
            options = model.call.attention_kwargs
            if text not in projected:
                if len(projected) == 3:  # the batch and its halves, of which a guider takes what it needs
                    projected.clear()
                projected[text] = self._project(text, options)
            nets, images = controlnets_of(self.controlnet), tensors["control_image"]
            images = images if isinstance(images, list | tuple) else [images]
            given = {
                "timestep": [times * net.config.get("timestep_scale", 1.0) for net in nets],
                "controlnet_cond": [
                    image.repeat(-(-len(stream) // len(image)), 1, 1, 1)[-len(stream) :] for image in images
                ],
                "conditioning_scale": scales,
            }
            if not self._is_multi:
                given = {name: value[0] for name, value in given.items()}
            arguments = given | {"attention_kwargs": options} | projected[text]
            return {"controlnet_block_samples": self._outputs(stream, arguments)}

        return residuals

    @property
    def _is_multi(self) -> bool:
        return hasattr(self.controlnet, "nets")

    def _scales_at(self, step: int, num_steps: int) -> list[float]:
        """The strengths at a step, 0 for those that pause."""
        begin, end = step / num_steps, (step + 1) / num_steps
        spans = zip(self.scales, self.starts, self.ends, strict=True)
        return [scale if first <= begin and end <= last else 0 for scale, first, last in spans]

    def _outputs(self, stream: Tensor, arguments: dict[str, Any]) -> Any:
        """What the transformer takes as `controlnet_block_samples`; the ControlNet runs alone, whenever it runs."""
        run = control_by_all if self._is_multi else control
        with exclusive(self.controlnet):
            samples = run(self.controlnet, stream, self.transformer.dtype, **arguments)
        if not callable(samples):
            return samples

        def alone(stream: Tensor) -> tuple[Tensor, ...]:
            with exclusive(self.controlnet):
                return samples(stream)

        return alone

    def _project(self, text: TextInputs, attention_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        """What the ControlNet is told of the texts; projected once for all steps where it can do that."""
        embeds = text.embeds.to(self.controlnet.dtype)
        if hasattr(self.controlnet, "encode_text"):
            with exclusive(self.controlnet):
                context = self.controlnet.encode_text(embeds, text.mask, attention_kwargs=attention_kwargs)
            return {"text_context": context} | ({} if self._is_multi else {"encoder_hidden_states": None})
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": text.mask}


def check_control_image(control_image: Any, controlnet: Any, multiple: int, has_vae: bool) -> None:
    """Raises, naming the argument, where the control image is wrong.

    Args:
        control_image: as in `SanaControlNetPipeline`.
        controlnet: one, or several of which each has an image.
        multiple: that the sides of a tensor must be of, in pixels.
        has_vae: whether there is an autoencoder.
    """
    if control_image is None:
        raise ValueError("`control_image` must be given, got None. Use the pipeline without a ControlNet.")
    if not has_vae:
        raise ValueError("`control_image` needs an autoencoder, but this pipeline was made without.")
    for image in _images(controlnet, control_image):
        if not isinstance(image, Tensor):
            continue
        if not image.is_floating_point() or image.ndim != 4:
            raise ValueError(
                "`control_image` must be an image, a list of images or a floating point tensor [images, channels, "
                f"height, width] in [-1, 1], got {image.dtype} {list(image.shape)}."
            )
        for name, side in zip(("height", "width"), image.shape[-2:], strict=True):
            check_size(f"{name}` of `control_image", side, multiple)


def size_of_tensors(control_image: Any, controlnet: Any) -> tuple[int, int] | None:
    """Height and width in pixels of the first control image that is a tensor, which sets the size; None without.

    Args:
        control_image, controlnet: checked by `check_control_image`.
    """
    for image in _images(controlnet, control_image):
        if isinstance(image, Tensor):
            return image.shape[-2], image.shape[-1]
    return None


def check_no_graphs(controlnet: Any, graphs: Any) -> None:
    """Raises where CUDA graphs of the transformer are wanted and a ControlNet runs inside of it."""
    if graphs is not None and any(wiring_of(net) == "nvlabs" for net in controlnets_of(controlnet)):
        raise RuntimeError(
            "`enable_cuda_graphs` cannot be combined with a ControlNet of `wiring='nvlabs'`, which runs "
            "inside the transformer. Call `pipe.disable_cuda_graphs()`."
        )


def encode_control(
    vae: Any,
    image_processor: Any,
    controlnet: Any,
    control_image: Any,
    size: tuple[int, int],
    num_prompts: int,
    num_images_per_prompt: int,
    device: torch.device,
) -> Tensor | list[Tensor]:
    """Control latents `[B, C, h, w]` in fp32, of several ControlNets a list of them; each image is encoded once.

    Args:
        vae, image_processor, controlnet: of the pipeline.
        control_image: as in `SanaControlNetPipeline`.
        size: height and width in pixels; images are resized to them, a tensor has them.
        num_prompts: P.
        num_images_per_prompt: B / P.
        device: that the autoencoder runs on.
    """
    counts = num_prompts, num_images_per_prompt
    latents = [
        for_each_output("control_image", encode_images(vae, _pixels(image_processor, image, size).to(device)), *counts)
        for image in _images(controlnet, control_image)
    ]
    return latents if hasattr(controlnet, "nets") else latents[0]


def cut_control(controlnet: Any, control_image: Any, repainting: Repainting, size: tuple[int, int]) -> Any:
    """The argument `control_image` where a part of an image is generated: as tensors in [-1, 1] of that part.

    Args:
        controlnet, control_image: as in `encode_control`, but of the whole image. Tensors are left as they are.
        repainting: says which part.
        size: height and width of generation, in pixels.
    """

    def cut(image: Any) -> Tensor:
        if isinstance(image, Tensor):
            return image
        pixels = resize_images(read_images("control_image", image), repainting.start.size)
        return fit_images(pixels[..., repainting.rows, repainting.columns], size) * 2 - 1

    images = [cut(image) for image in _images(controlnet, control_image)]
    return images if hasattr(controlnet, "nets") else images[0]


def _numbers(controlnet: Any, name: str, value: Any) -> list[float]:
    """The argument `name` as a number for each ControlNet; for several, one number is for all."""
    count = len(controlnets_of(controlnet))
    is_listed = hasattr(controlnet, "nets") and isinstance(value, list | tuple)
    values = list(value) if is_listed else [value] * count
    _check_count(name, values, count)
    for each in values:
        check_number(name, each)
    return values


def _images(controlnet: Any, control_image: Any) -> list[Any]:
    """What the argument `control_image` has for each ControlNet; of several, it is a list with an entry each."""
    if not hasattr(controlnet, "nets"):
        return [control_image]
    if not isinstance(control_image, list | tuple):
        raise TypeError(
            "`control_image` must be a list with an entry for each ControlNet of the pipeline, got"
            f" {type(control_image).__name__}."
        )
    _check_count("control_image", control_image, len(controlnet.nets))
    return list(control_image)


def _check_count(name: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise ValueError(f"`{name}` must have an entry for each of the {count} ControlNets, got {len(values)}.")


def _pixels(image_processor: Any, control_image: Any, size: tuple[int, int]) -> Tensor:
    """The images for one ControlNet, `[images, 3, height, width]` in [-1, 1]."""
    height, width = size
    if not isinstance(control_image, Tensor):
        control_image = image_processor.preprocess(_in_color(control_image), height=height, width=width)
    if control_image.shape[-2:] != size:
        raise ValueError(
            f"`control_image` must have the size of generation where it is a tensor, {height} by {width}, got"
            f" {list(control_image.shape)}. Resize it, or give a PIL image."
        )
    if control_image.shape[1] == 1:
        control_image = control_image.expand(-1, 3, -1, -1)
    if control_image.shape[1] != 3:
        raise ValueError(f"`control_image` must be gray or RGB, got {control_image.shape[1]} channels.")
    if not bool(control_image.isfinite().all()):
        raise ValueError("`control_image` must be finite, but has NaN or infinite values.")
    return control_image


def _in_color(image: Any) -> Any:
    """PIL images in RGB, as edges and depth often are gray; arrays as tensors in [0, 1]; lists of them."""
    if isinstance(image, list | tuple):
        items = [_in_color(item) for item in image]
        is_batched = all(isinstance(item, Tensor) for item in items)
        return torch.cat([item if item.ndim == 4 else item[None] for item in items]) if is_batched else items
    if isinstance(image, np.ndarray):
        return to_pixels("control_image", image)
    return to_rgb(image, "control_image") if isinstance(image, Image.Image) else image


def _widths(config: Any) -> dict[str, int]:
    """In what a ControlNet and its transformer must agree."""
    widths = {name: config[name] for name in ("in_channels", "patch_size", "caption_channels")}
    return widths | {
        "num_attention_heads` times `attention_head_dim": config["num_attention_heads"] * config["attention_head_dim"]
    }
