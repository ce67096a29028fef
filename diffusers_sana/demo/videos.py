"""A pipeline of videos, as the page asks it."""

import inspect
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from PIL import Image

import diffusers_sana


FROM_IMAGE = {"SanaVideoPipeline": "SanaImageToVideoPipeline"}  # others take an image themselves, or none
QUALITY = {"quality": 90, "method": 4}  # of WebP


@dataclass(frozen=True)
class Made:
    """A video.

    Attributes:
        url: of an animated WebP, with the file in it.
        frames: how many it has.
        seconds: from prompt to video.
    """

    url: str
    frames: int
    seconds: float


class Videos:
    """One of the pipelines of SANA-Video.

    Args:
        pipe: on its device.
        fps: frames per second of its videos.

    Attributes:
        default_steps, default_guidance: of the pipeline; None where it has no such argument.
        default_frames: which are also the most.
        step: a number of frames is one more than a multiple of it.
        takes_image: whether a video can begin with an image.
    """

    def __init__(self, pipe: Any, fps: float) -> None:
        self.pipe, self.fps = pipe, fps
        parameters = inspect.signature(type(pipe).__call__).parameters
        self._from_image = pipe if "image" in parameters else None
        if name := FROM_IMAGE.get(type(pipe).__name__):
            self._from_image = getattr(diffusers_sana, name)(**pipe.components)
        for each in filter(None, (pipe, self._from_image)):
            each.set_progress_bar_config(disable=True)
        self._has_callback = "callback_on_step_end" in parameters
        self.default_steps, self.default_guidance = (
            parameters[name].default if name in parameters else None
            for name in ("num_inference_steps", "guidance_scale")
        )
        self.step = pipe.vae_scale_factor_temporal
        longest = (pipe.transformer.config.rope_max_seq_len - 1) * self.step + 1
        self.default_frames = min(pipe._default_frames, longest)
        self.takes_image = self._from_image is not None

    def generate(
        self,
        prompt: str,
        seed: int,
        steps: int | None,
        guidance: float | None,
        frames: int,
        on_step: Callable[[int, int], None],
        image: Image.Image | None = None,
    ) -> Made:
        """A video of the native size.

        Args:
            prompt: what to generate.
            seed: of the noise, which is sampled on the CPU: the same on every device.
            steps, guidance: as the pipeline takes them; of no effect where it does not.
            frames: how many.
            on_step: called with the number of finished steps and that of all steps.
            image: the first frame.

        Raises:
            TypeError, ValueError: as the pipeline, before anything is computed.
        """
        arguments: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(seed), "frames": frames}
        if self.default_steps is not None:
            arguments["num_inference_steps"] = steps
        if self.default_guidance is not None:
            arguments["guidance_scale"] = guidance
        pipe = self.pipe
        if image is not None:
            pipe = self._from_image
            arguments |= {"image": image, "image_fit": "crop"}
        if self._has_callback:

            def after_step(pipe: Any, step: int, _timestep: Any, _tensors: dict) -> dict:
                on_step(step + 1, pipe.num_timesteps)
                return {}

            arguments["callback_on_step_end"] = after_step
        started = time.perf_counter()
        first, *others = pipe(prompt=prompt, **arguments).frames[0]
        seconds = time.perf_counter() - started
        file = BytesIO()
        duration = round(1000 / self.fps)  # milliseconds
        first.save(file, "WEBP", save_all=True, append_images=others, duration=duration, loop=0, **QUALITY)
        return Made(f"data:image/webp;base64,{b64encode(file.getvalue()).decode()}", 1 + len(others), seconds)
