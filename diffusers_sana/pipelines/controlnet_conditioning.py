"""What pipelines with a ControlNet add to the others: the control image, and the ControlNet in each step.

Legend: P prompts, B images (prompts times images per prompt), C latent channels, h w latent height and width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from diffusers_sana.checks import check_number, check_size
from diffusers_sana.images import to_pixels, to_rgb
from diffusers_sana.locks import exclusive
from diffusers_sana.models.controlnets.controlnet_sana import control, wiring_of
from diffusers_sana.pipelines.conditioning import for_each_output
from diffusers_sana.pipelines.decoding import encode_images
from diffusers_sana.pipelines.sampling import Denoiser, Predict, TextInputs, predict_flow


logger = logging.get_logger(__name__)


def warn_of_unused_outputs(controlnet: Any, transformer: Any) -> None:
    """Says where nothing reads the last outputs of the ControlNet: the transformer has too few blocks."""
    if controlnet is None or transformer is None:
        return
    layers, blocks = controlnet.config["num_layers"], transformer.config["num_layers"]
    used = blocks if wiring_of(controlnet) == "nvlabs" else blocks - 1  # the first block is not controlled
    if layers > used:
        logger.warning(
            f"`controlnet` has {layers} layers for a transformer of {blocks}, which uses the outputs of {used}. Is"
            " it the ControlNet that was trained for this transformer?"
        )


@dataclass(frozen=True)
class Control:
    """What the ControlNet does in a call, checked.

    Attributes:
        controlnet, transformer: of the pipeline.
        scale: strength.
        start, end: the steps between these fractions are controlled; in the others the ControlNet does not run.
    """

    controlnet: Any
    transformer: Any
    scale: float
    start: float
    end: float

    def __post_init__(self) -> None:
        check_number("controlnet_conditioning_scale", self.scale)
        check_number("control_guidance_start", self.start)
        check_number("control_guidance_end", self.end)
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                "`control_guidance_start` and `control_guidance_end` must be fractions of the steps, the first below"
                f" the second, got {self.start} and {self.end}."
            )
        ours, theirs = _widths(self.controlnet.config), _widths(self.transformer.config)
        for name in ours:
            if ours[name] != theirs[name]:
                raise ValueError(
                    f"`controlnet` must fit `transformer`, but their `{name}` are {ours[name]} and {theirs[name]}."
                    " Load the ControlNet that was trained for this transformer."
                )
        if wiring_of(self.controlnet) == "nvlabs" and not hasattr(self.transformer, "encode_text"):
            raise ValueError(
                "`controlnet` has `wiring='nvlabs'`, which the transformer of diffusers cannot run. Load the "
                "transformer with this package."
            )

    def predictor(self, tensors: dict[str, Any], num_steps: int) -> Predict:
        """A `predict` for the denoising loop, in which the ControlNet steers.

        Args:
            tensors: as in `denoise`, with control latents as `control_image`, of B or 2 B images.
            num_steps: of the loop.
        """
        projected: dict[TextInputs, dict[str, Any]] = {}

        def predict(model: Denoiser, latents: Tensor, t: Tensor, text: TextInputs) -> Tensor:
            i = model.step_index
            if self.scale == 0 or not (self.start <= i / num_steps and (i + 1) / num_steps <= self.end):
                return predict_flow(model, latents, t, text)
            options = model.call.attention_kwargs
            if text not in projected:
                if len(projected) == 3:  # the batch and its halves, of which a guider takes what it needs
                    projected.clear()
                projected[text] = self._project(text, options)
            stream = torch.cat([latents, latents]) if text.is_guided else latents
            cond = tensors["control_image"]
            arguments = {
                "timestep": t.expand(len(stream)) * self.transformer.config.timestep_scale,
                "controlnet_cond": cond.repeat(-(-len(stream) // len(cond)), 1, 1, 1)[-len(stream) :],
                "conditioning_scale": self.scale,
                "attention_kwargs": options,
                **projected[text],
            }
            samples = self._outputs(stream, arguments)
            return predict_flow(model, latents, t, text, controlnet_block_samples=samples)

        return predict

    def _outputs(self, stream: Tensor, arguments: dict[str, Any]) -> Any:
        """What the transformer takes as `controlnet_block_samples`; the ControlNet runs alone, whenever it runs."""
        with exclusive(self.controlnet):
            samples = control(self.controlnet, stream, self.transformer.dtype, **arguments)
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
            return {"encoder_hidden_states": None, "text_context": context}
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": text.mask}


def check_control_image(control_image: Any, multiple: int, has_vae: bool) -> None:
    """Raises, naming the argument, where the control image is wrong.

    Args:
        control_image: as in `SanaControlNetPipeline`.
        multiple: that the sides of a tensor must be of, in pixels.
        has_vae: whether there is an autoencoder.
    """
    if control_image is None:
        raise ValueError("`control_image` must be given, got None. Use SanaPipeline to generate without one.")
    if isinstance(control_image, Tensor):
        if not control_image.is_floating_point() or control_image.ndim != 4:
            raise ValueError(
                "`control_image` must be an image, a list of images or a floating point tensor [images, channels, "
                f"height, width] in [-1, 1], got {control_image.dtype} {list(control_image.shape)}."
            )
        for name, side in zip(("height", "width"), control_image.shape[-2:], strict=True):
            check_size(f"{name}` of `control_image", side, multiple)
    if not has_vae:
        raise ValueError("`control_image` needs an autoencoder, but this pipeline was made without.")


def check_no_graphs(controlnet: Any, graphs: Any) -> None:
    """Raises where CUDA graphs of the transformer are wanted and the ControlNet runs inside of it."""
    if graphs is not None and wiring_of(controlnet) == "nvlabs":
        raise RuntimeError(
            "`enable_cuda_graphs` cannot be combined with a ControlNet of `wiring='nvlabs'`, which runs "
            "inside the transformer. Call `pipe.disable_cuda_graphs()`."
        )


def encode_control(
    vae: Any,
    image_processor: Any,
    control_image: Any,
    size: tuple[int, int],
    num_prompts: int,
    num_images_per_prompt: int,
    device: torch.device,
) -> Tensor:
    """Control latents `[B, C, h, w]` in fp32; each image is encoded once.

    Args:
        vae, image_processor: of the pipeline.
        control_image: as in `SanaControlNetPipeline`.
        size: height and width in pixels; images are resized to them, a tensor has them.
        num_prompts: P.
        num_images_per_prompt: B / P.
        device: that the autoencoder runs on.
    """
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
    latents = encode_images(vae, control_image.to(device))
    return for_each_output("control_image", latents, num_prompts, num_images_per_prompt)


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
