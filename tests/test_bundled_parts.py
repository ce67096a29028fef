"""The bundled Sprint transformer and ControlNet, loaded as their cards say, do what they were trained for."""

import pytest
import torch

from diffusers_sana import (
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPipeline,
    SanaSprintPipeline,
)
from diffusers_sana.checkpoints import SANA_EMOJI, SANA_EMOJI_EDGES, SANA_EMOJI_SPRINT
from diffusers_sana.images import sobel_edges


@pytest.fixture(scope="module")
def base():
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, prompt="an apple on a blue background, 3d style", **options):
    """An image `[1, 3, H, W]` in [0, 1]."""
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **options).images


def color(image, rows, columns):
    return image[0, :, rows, columns].mean(dim=(1, 2))


def test_sprint_draws_in_one_step(base):
    pipe = SanaSprintPipeline.from_teacher(base, SANA_EMOJI_SPRINT)
    pipe.set_progress_bar_config(disable=True)
    image = generate(pipe, num_inference_steps=1)
    assert torch.equal(generate(pipe, num_inference_steps=1), image)
    apple, background = color(image, slice(108, 148), slice(108, 148)), color(image, slice(8, 40), slice(8, 40))
    assert apple.argmax() == 0
    assert background.argmax() == 2
    assert apple[0] - background[0] > 0.3
    full = generate(base)
    assert (image - full).abs().mean() < (generate(base, num_inference_steps=1) - full).abs().mean()


def test_edges_are_followed(base):
    """A ring that a ball alone would not be: edges of the image agree better with it than without the ControlNet."""
    controlnet = SanaControlNetModel.from_pretrained(SANA_EMOJI_EDGES, dtype=torch.float32)
    pipe = SanaControlNetPipeline.from_pretrained(SANA_EMOJI, controlnet=controlnet, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    along = torch.linspace(-1, 1, 256)
    disc = ((along[:, None] ** 2 + along[None] ** 2) < 0.45).float().expand(1, 3, 256, 256) * 2 - 1
    edges = sobel_edges(disc)

    def agreement(scale):
        image = generate(
            pipe,
            "a basketball on a gray background, flat style",
            control_image=edges,
            controlnet_conditioning_scale=scale,
        )
        generated = sobel_edges(image * 2 - 1)
        return torch.nn.functional.cosine_similarity(
            (generated / 2 + 0.5).flatten(1), (edges / 2 + 0.5).flatten(1)
        ).item()

    assert agreement(1.0) > agreement(0.0)
