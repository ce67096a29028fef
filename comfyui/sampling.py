"""One call of a pipeline for a node: its inputs in the pipeline's form, progress, previews, interruption.

Legend: B images, C latent channels, h w latent height and width, H W height and width in pixels.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import host
from .model import SanaModel
from .previews import clean_latents


class Watcher:
    """The callback after each step: moves ComfyUI's bar, shows previews, keeps the latents.

    Updating the bar raises ComfyUI's exception where the user has interrupted. It ends the call of the pipeline.

    Attributes:
        latents: after the last step so far, `[B, C, h, w]`.
    """

    def __init__(self, model: SanaModel, steps: int) -> None:
        self.bar = host.progress_bar(steps)
        self.preview = model.preview() if host.wants_previews() else None
        self.latents: Tensor | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Changes nothing."""
        before, self.latents = self.latents, tensors["latents"]
        if self.bar is not None:
            shown = None if self.preview is None else clean_latents(pipe, self.latents, before)
            message = None if shown is None else host.preview_message(self.preview.image(shown))
            self.bar.update_absolute(step + 1, pipe.num_timesteps, message)  # of image-to-image, fewer than `steps`
        return {}


def generate(model: SanaModel, pipe: Any, steps: int, seed: int, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs a pipeline.

    Args:
        model: whose LoRAs are in force.
        pipe: around the components of `model`.
        steps, seed: the noise comes from the CPU, so it is the same on every device.
        options: arguments of the pipeline.

    Returns:
        Images `[B, H, W, 3]` in [0, 1] on the CPU, and their latents in ComfyUI's form.
    """
    model.activate_loras()
    watcher = Watcher(model, steps)
    images = run_pipeline(pipe, seed, watcher, offloaded=model.pipe, num_inference_steps=steps, **options)
    scale = model.scaling_factor
    if model.is_sprint:
        scale *= model.pipe.scheduler.config.sigma_data
    return images, {"samples": watcher.latents.float().cpu() / scale}


def run_pipeline(pipe: Any, seed: int, callback: Any, offloaded: Any, **options: Any) -> Tensor:
    """Images `[B, H, W, 3]` in [0, 1] on the CPU, from `pipe`; `offloaded` is the pipeline with offloading hooks."""
    generator = torch.Generator().manual_seed(seed)
    try:
        images = pipe(generator=generator, output_type="pt", callback_on_step_end=callback, **options).images
    finally:
        offloaded.maybe_free_model_hooks()  # also after an interruption
    return images.movedim(1, -1).float().cpu()


def channels_first(images: Tensor) -> Tensor:
    """Images `[B, H, W, 3 or 4]` as the pipelines take them: `[B, 3, H, W]`."""
    return images[..., :3].movedim(-1, 1)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images `[B, H, W, 3 or 4]` in [0, 1]."""
    return [Image.fromarray((image * 255).round().clamp(0, 255).byte().cpu().numpy()) for image in images[..., :3]]


def control_size(model: SanaModel) -> tuple[int, int]:
    """Height and width in the proportions of the first control image, of about the area of the checkpoint's images."""
    height, width = model.controls[0].image.shape[1:3]
    transformer, scale = model.pipe.transformer.config, model.pipe.vae_scale_factor
    native, cell = transformer.sample_size * scale, transformer.patch_size * scale
    sides = (native * (side / other) ** 0.5 for side, other in ((height, width), (width, height)))
    return tuple(max(1, round(side / cell)) * cell for side in sides)


def control_options(model: SanaModel, prompt: str, start: Tensor | None = None) -> dict[str, Any]:
    """What a pipeline with ControlNets is called with beyond its other arguments.

    Args:
        model: with `controls`.
        prompt: one; repeated for several control images.
        start: the images `[B, H, W, 3]` that image-to-image begins with.

    Raises:
        ValueError: the control images of a ControlNet are neither one nor as many as those of another or of `start`.
    """
    counts = [len(control.image) for control in model.controls]
    count = max(counts)
    for each in counts:
        if start is not None and len(start) > 1 and each not in (1, len(start)):
            raise ValueError(f"the ControlNet's `image` must be one or as many as `image`, {len(start)}, got {each}.")
        if each not in (1, count):
            raise ValueError(f"the ControlNets' `image` must be one each, or equally many, got {each} and {count}.")
    each_has = {
        "control_image": [to_pil(control.image) for control in model.controls],
        "controlnet_conditioning_scale": [control.strength for control in model.controls],
        "control_guidance_start": [control.start for control in model.controls],
        "control_guidance_end": [control.end for control in model.controls],
    }
    options = {name: values if len(values) > 1 else values[0] for name, values in each_has.items()}
    return {"prompt": prompt if count == 1 else [prompt] * count, **options}
