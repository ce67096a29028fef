"""A pipeline as it is and with its transformer in 4 bits, for the same seeds."""

import inspect
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

import diffusers_sana
from diffusers_sana import quantize
from diffusers_sana.pipelines.resolution import trained_sizes


# What an image can start from besides text -> class of the pipeline, by that of the pipeline for text.
STARTS = {
    "SanaPipeline": {"image": "SanaImg2ImgPipeline", "mask": "SanaInpaintPipeline"},
    "SanaSprintPipeline": {"image": "SanaSprintImg2ImgPipeline"},
}


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
        controlnet: for a `SanaPipeline`, on its device; both precisions share it.

    Attributes:
        report: of the quantization.
        pipes: by precision, such as "16 bit", and then by what the image starts from: "text", and what the model can
            of "image", "mask" and "sketch", the last with a `controlnet`.
        sizes: heights and widths in pixels that the checkpoint was trained on, the square one first.
        default_steps, default_guidance: of the pipeline.

    Raises:
        ValueError: the transformer is already quantized.
    """

    def __init__(self, pipe: Any, controlnet: Any = None) -> None:
        transformer = deepcopy(pipe.transformer)
        self.report = quantize(transformer, progress=False)
        quantized = type(pipe)(**{**pipe.components, "transformer": transformer})
        texts = {f"{torch.finfo(pipe.dtype).bits} bit": pipe, "4 bit": quantized}
        self.pipes: dict[str, dict[str, Any]] = {}
        for precision, text_pipe in texts.items():
            others = {
                start: getattr(diffusers_sana, name)(**text_pipe.components)
                for start, name in STARTS[type(pipe).__name__].items()
            }
            if controlnet is not None:
                others["sketch"] = diffusers_sana.SanaControlNetPipeline(**text_pipe.components, controlnet=controlnet)
            self.pipes[precision] = {"text": text_pipe, **others}
            for each in self.pipes[precision].values():
                each.set_progress_bar_config(disable=True)
            text_pipe("", num_inference_steps=1)  # warm-up: the first image takes no longer than the next

        parameters = inspect.signature(type(pipe).__call__).parameters
        self.default_steps: int = parameters["num_inference_steps"].default
        self.default_guidance: float = parameters["guidance_scale"].default
        self.sizes = trained_sizes(pipe.transformer.config.sample_size * pipe.vae_scale_factor)

    def generate(
        self,
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        size: tuple[int, int],
        on_step: Callable[[str, int, int], None],
        start: str = "text",
        **inputs: Any,
    ) -> list[Generated]:
        """The same image in both precisions.

        Args:
            prompt: what to generate.
            seed: of the noise, which is sampled on the CPU: the same on every device.
            steps: denoising steps.
            guidance: weight of the prompt.
            size: height and width, one of `sizes`.
            on_step: called with the precision, the number of finished steps and that of all steps.
            start: what the image starts from.
            inputs: what the pipeline of `start` takes besides, such as `image` and `strength`.

        Raises:
            TypeError, ValueError: as the pipeline, before anything is computed.
        """
        results = []
        for precision, pipes in self.pipes.items():

            def after_step(pipe: Any, step: int, _timestep: Any, _tensors: dict, precision: str = precision) -> dict:
                on_step(precision, step + 1, pipe.num_timesteps)
                return {}

            pipe, started = pipes[start], time.perf_counter()
            image = pipe(
                prompt=prompt,
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=size[0],
                width=size[1],
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=after_step,
                **inputs,
            ).images[0]
            seconds = time.perf_counter() - started
            results.append(Generated(precision, image, seconds, pipe.transformer.get_memory_footprint() / 1e6))
        return results
