"""What pipelines with a ControlNet add to the others: the control image, and its branch in each step.

Legend: P prompts, B images (prompts times images per prompt), C latent channels, h w latent height and width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from diffusers_sana.checks import check_number
from diffusers_sana.images import to_pixels, to_rgb
from diffusers_sana.models.controlnets.controlnet_sana import control, wiring_of
from diffusers_sana.pipelines.conditioning import for_each_output
from diffusers_sana.pipelines.decoding import encode_images
from diffusers_sana.pipelines.resolution import check_size
from diffusers_sana.pipelines.sampling import TextInputs


logger = logging.get_logger(__name__)


class ControlNetConditioning:
    """Part of the pipelines with a ControlNet, which have the components."""

    controlnet: Any
    transformer: Any
    vae: Any
    image_processor: Any
    vae_scale_factor: int
    attention_kwargs: Any
    _cuda_graphs: Any
    _execution_device: Any
    _predict: Any

    def _warn_of_unused_outputs(self) -> None:
        """Says where nothing reads the last outputs of the ControlNet: the transformer has too few blocks."""
        if self.controlnet is None or self.transformer is None:
            return
        layers, blocks = self.controlnet.config["num_layers"], self.transformer.config["num_layers"]
        used = blocks if wiring_of(self.controlnet) == "nvlabs" else blocks - 1  # the first block is not controlled
        if layers > used:
            logger.warning(
                f"`controlnet` has {layers} layers for a transformer of {blocks}, which uses the outputs of {used}. Is"
                " it the ControlNet that was trained for this transformer?"
            )

    def _check_control(
        self, control_image: Any, scale: float, control_guidance_start: float, control_guidance_end: float
    ) -> None:
        """Raises, naming the argument, where what concerns the ControlNet is wrong."""
        if control_image is None:
            raise ValueError("`control_image` must be given, got None. Use SanaPipeline to draw without one.")
        if isinstance(control_image, Tensor):
            if not control_image.is_floating_point() or control_image.ndim != 4:
                raise ValueError(
                    "`control_image` must be an image, a list of images or a floating point tensor [images, channels, "
                    f"height, width] in [-1, 1], got {control_image.dtype} {list(control_image.shape)}."
                )
            multiple = self.vae_scale_factor * self.transformer.config.patch_size
            for name, side in zip(("height", "width"), control_image.shape[-2:], strict=True):
                check_size(f"{name}` of `control_image", side, multiple)
        check_number("controlnet_conditioning_scale", scale)
        check_number("control_guidance_start", control_guidance_start)
        check_number("control_guidance_end", control_guidance_end)
        if not 0 <= control_guidance_start < control_guidance_end <= 1:
            raise ValueError(
                "`control_guidance_start` and `control_guidance_end` must be shares of the steps, the first below the "
                f"second, got {control_guidance_start} and {control_guidance_end}."
            )
        if self.vae is None:
            raise ValueError("`control_image` needs an autoencoder, but this pipeline was made without.")
        ours, theirs = _widths(self.controlnet.config), _widths(self.transformer.config)
        for name in ours:
            if ours[name] != theirs[name]:
                raise ValueError(
                    f"`controlnet` must fit `transformer`, but their `{name}` are {ours[name]} and {theirs[name]}."
                    " Load the ControlNet that was trained for this transformer."
                )
        if wiring_of(self.controlnet) == "nvlabs":
            if not hasattr(self.transformer, "encode_text"):
                raise ValueError(
                    "`controlnet` has `wiring='nvlabs'`, which the transformer of diffusers cannot run. Load the "
                    "transformer with this package."
                )
            if self._cuda_graphs is not None:
                raise RuntimeError(
                    "`enable_cuda_graphs` cannot be combined with a ControlNet of `wiring='nvlabs'`, which runs "
                    "inside the transformer. Call `pipe.disable_cuda_graphs()`."
                )

    def _encode_control(
        self, control_image: Any, height: int, width: int, num_prompts: int, num_images_per_prompt: int
    ) -> Tensor:
        """Control latents `[B, C, h, w]` in fp32; each image is encoded once.

        Args:
            control_image: as in `__call__`.
            height, width: pixels; images are resized to them, a tensor has them.
            num_prompts: P.
            num_images_per_prompt: B / P.
        """
        if not isinstance(control_image, Tensor):
            control_image = self.image_processor.preprocess(_in_color(control_image), height=height, width=width)
        if control_image.shape[-2:] != (height, width):
            raise ValueError(
                f"`control_image` must have the size of generation where it is a tensor, {height} by {width}, got"
                f" {list(control_image.shape)}. Resize it, or give a picture."
            )
        if control_image.shape[1] == 1:
            control_image = control_image.expand(-1, 3, -1, -1)
        if control_image.shape[1] != 3:
            raise ValueError(f"`control_image` must be gray or RGB, got {control_image.shape[1]} channels.")
        if not bool(control_image.isfinite().all()):
            raise ValueError("`control_image` must be finite, but has NaN or infinite values.")
        latents = encode_images(self.vae, control_image.to(self._execution_device))
        return for_each_output("control_image", latents, num_prompts, num_images_per_prompt)

    def _controlled(
        self, tensors: dict[str, Any], num_steps: int, scale: float, start: float, end: float
    ) -> Callable[..., Tensor]:
        """A `predict` for the denoising loop, in which the ControlNet steers.

        Args:
            tensors: as in `_denoise`, with control latents as `control_image`, of B or 2 B images.
            num_steps: of the loop.
            scale: strength.
            start, end: the steps of this share of them are controlled; in the others the ControlNet does not run.
        """
        scales: Iterator[float] = iter(
            scale if start <= i / num_steps and (i + 1) / num_steps <= end else 0.0 for i in range(num_steps)
        )
        projected: tuple[TextInputs, dict[str, Any]] | None = None

        def predict(run: Callable[..., Tensor], latents: Tensor, t: Tensor, text: TextInputs) -> Tensor:
            nonlocal projected
            now = next(scales)
            if now == 0:
                return self._predict(run, latents, t, text)
            if projected is None or projected[0] is not text:
                projected = text, self._control_text(text)
            stream = torch.cat([latents, latents]) if text.is_guided else latents
            cond = tensors["control_image"]
            samples = control(
                self.controlnet,
                stream,
                self.transformer.dtype,
                timestep=t.expand(len(stream)) * self.transformer.config.timestep_scale,
                controlnet_cond=cond.repeat(len(stream) // len(cond), 1, 1, 1),
                conditioning_scale=now,
                attention_kwargs=self.attention_kwargs,
                **projected[1],
            )
            return self._predict(run, latents, t, text, controlnet_block_samples=samples)

        return predict

    def _control_text(self, text: TextInputs) -> dict[str, Any]:
        """What the ControlNet is told of the texts; projected once for all steps where it can do that."""
        embeds = text.embeds.to(self.controlnet.dtype)
        if hasattr(self.controlnet, "encode_text"):
            context = self.controlnet.encode_text(embeds, text.mask, attention_kwargs=self.attention_kwargs)
            return {"encoder_hidden_states": None, "text_context": context}
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": text.mask}


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
