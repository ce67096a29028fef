"""A pipeline as it is and with its transformer in 4 bits, for the same seeds."""

import inspect
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from diffusers_sana import quantize
from diffusers_sana.pipelines.resolution import trained_sizes


@dataclass(frozen=True)
class Generated:
    """An image, its time and its memory.

    Attributes:
        precision: of the transformer, such as "16 bit".
        image: the image.
        seconds: from prompt to image.
        megabytes: of the transformer's weights, in 10^6 bytes.
    """

    precision: str
    image: Image.Image
    seconds: float
    megabytes: float


class Comparison:
    """A Sana pipeline and its 4-bit copy, which share everything but the transformer.

    Args:
        pipe: `SanaPipeline` or `SanaSprintPipeline`, on its device and not quantized.

    Raises:
        ValueError: the transformer is already quantized.
    """

    def __init__(self, pipe: Any) -> None:
        transformer = deepcopy(pipe.transformer)
        self.report = quantize(transformer, progress=False)
        quantized = type(pipe)(**{**pipe.components, "transformer": transformer})
        self.pipes: dict[str, Any] = {f"{torch.finfo(pipe.dtype).bits} bit": pipe, "4 bit": quantized}
        for precision_pipe in self.pipes.values():
            precision_pipe.set_progress_bar_config(disable=True)
            precision_pipe("", num_inference_steps=1)  # warm-up: the first image takes no longer than the next

        parameters = inspect.signature(type(pipe).__call__).parameters
        self.default_steps: int = parameters["num_inference_steps"].default
        self.default_guidance: float = parameters["guidance_scale"].default
        # Heights and widths in pixels that the checkpoint was trained on, the square one first.
        self.sizes = trained_sizes(pipe.transformer.config.sample_size * pipe.vae_scale_factor)

    def generate(
        self,
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        size: tuple[int, int],
        on_step: Callable[[str, int], None],
    ) -> list[Generated]:
        """The same image in both precisions.

        Args:
            prompt: what to generate.
            seed: of the noise, which is sampled on the CPU: the same on every device.
            steps: denoising steps.
            guidance: weight of the prompt.
            size: height and width, one of `sizes`.
            on_step: called with the precision and the number of finished steps.

        Raises:
            TypeError, ValueError: as the pipeline, before anything is computed.
        """
        results = []
        for precision, pipe in self.pipes.items():

            def after_step(_pipe: Any, step: int, _timestep: Any, _tensors: dict, precision: str = precision) -> dict:
                on_step(precision, step + 1)
                return {}

            started = time.perf_counter()
            image = pipe(
                prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=size[0],
                width=size[1],
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=after_step,
            ).images[0]
            seconds = time.perf_counter() - started
            results.append(Generated(precision, image, seconds, pipe.transformer.get_memory_footprint() / 1e6))
        return results
