"""`SanaSprintImg2ImgPipeline` against diffusers', and what only ours does."""

import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

import diffusers_sana
from diffusers_sana import SanaSprintImg2ImgPipeline, SanaSprintPipeline
from tests.numerics import assert_close_fp32
from tests.pipelines.sprint_cases import CALL, sprint_pipeline


@pytest.fixture(scope="module")
def ours():
    return sprint_pipeline(diffusers_sana, "SanaSprintImg2ImgPipeline")


@pytest.fixture(scope="module")
def upstream():
    return sprint_pipeline(diffusers, "SanaSprintImg2ImgPipeline")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_image(height=32, width=64, number=1):
    return torch.rand(number, 3, height, width, generator=seeded(7))


def as_pil(tensor):
    return [Image.fromarray((item.movedim(0, -1) * 255).byte().numpy()) for item in tensor]


@pytest.mark.parametrize(
    "arguments",
    [
        {"image": random_image()},
        {"image": random_image()[0], "strength": 0.4},
        {"image": as_pil(random_image())[0], "num_inference_steps": 4, "strength": 0.75},
        {"image": as_pil(random_image(50, 40))[0], "num_inference_steps": 1, "strength": 1.0},
        {"image": random_image(64, 32), "num_inference_steps": 3, "strength": 0.5},
        {"image": np.array(as_pil(random_image())[0]) / np.float32(255), "output_type": "latent"},
        {"image": random_image(number=2), "prompt": ["a fox", "two red apples"], "strength": 0.5},
        # Of equal length: diffusers gives the images of several prompts each other's masks.
        {"image": random_image(), "prompt": ["a fox", "a cat"], "num_images_per_prompt": 2, "strength": 0.5},
        {"image": random_image(), "latents": torch.randn(1, 4, 16, 32, generator=seeded()), "strength": 0.5},
    ],
    ids=["tensor", "weak", "pil", "resized pil", "resized tensor", "array", "batch", "several", "latents"],
)
def test_equals_diffusers(ours, upstream, arguments):
    arguments = {**CALL, **arguments}
    images = ours(**arguments, generator=seeded()).images
    if arguments.get("num_inference_steps", 2) != 2:
        arguments["intermediate_timesteps"] = None  # which diffusers insists on
    assert_close_fp32(images, upstream(**arguments, generator=seeded()).images)


def test_latents_in_place_of_an_image(ours):
    call = {name: value for name, value in CALL.items() if name not in ("height", "width")}
    vae = ours.vae
    with torch.no_grad():
        latents = vae.encode(random_image() * 2 - 1).latent * vae.config.scaling_factor
    expected = ours(**call, image=random_image(), strength=0.5, generator=seeded()).images
    assert_close_fp32(ours(**call, image=latents, strength=0.5, generator=seeded()).images, expected)
    assert expected.shape == (1, 3, 32, 64)  # the size of the image


def test_a_weak_change_stays_near_the_image(ours):
    """The first of few steps is known to be the image in the latents, whatever the random weights say."""
    call = {**CALL, "timesteps": [1.5, 0.02, 0.0], "output_type": "latent"}
    latents = torch.randn(1, 4, 16, 32, generator=seeded())
    call |= {"height": None, "width": None, "image": latents}
    near = ours(**call, strength=0.5, generator=seeded()).images
    far = ours(**call, strength=1.0, generator=seeded()).images
    assert (near - latents).norm() < 0.1 * latents.norm() < (far - latents).norm()


def test_several_images_of_one_prompt(ours):
    together = ours(**CALL, image=random_image(number=2), strength=0.5, generator=[seeded(1), seeded(2)]).images
    for index, seed in ((0, 1), (1, 2)):
        alone = ours(**CALL, image=random_image(number=2)[index], strength=0.5, generator=seeded(seed)).images
        assert_close_fp32(together[index : index + 1], alone)


def test_from_pipe_and_auto_pipeline(tmp_path, ours):
    text_to_image = SanaSprintPipeline(**ours.components)
    shared = SanaSprintImg2ImgPipeline.from_pipe(text_to_image)
    assert shared.transformer is ours.transformer
    text_to_image.save_pretrained(tmp_path)
    for pipe in (
        AutoPipelineForImage2Image.from_pretrained(tmp_path),
        AutoPipelineForImage2Image.from_pipe(text_to_image),
        SanaSprintImg2ImgPipeline.from_pretrained(tmp_path),
    ):
        assert type(pipe) is SanaSprintImg2ImgPipeline
        images = pipe(**CALL, image=random_image(), strength=0.5, generator=seeded()).images
        assert_close_fp32(images, ours(**CALL, image=random_image(), strength=0.5, generator=seeded()).images)


@pytest.mark.parametrize(
    "change", [lambda image: image * 2 - 1, lambda image: image * 3 - 1.5, lambda image: image * 2]
)
def test_values_outside_of_0_to_1_are_those_of_diffusers(ours, upstream, change, caplog):
    """Below 0 means [-1, 1]; beyond white is kept. Both are likely mistakes."""
    image = change(random_image())
    logging.getLogger("diffusers_sana").addHandler(caplog.handler)
    try:
        images = ours(**CALL, image=image, generator=seeded()).images
    finally:
        logging.getLogger("diffusers_sana").removeHandler(caplog.handler)
    assert_close_fp32(images, upstream(**CALL, image=image, generator=seeded()).images)
    assert "`image` should have values in [0, 1], got" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "`image` must be given, got None. Use SanaSprintPipeline"),
        ({"image": random_image() * torch.inf}, ValueError, "`image` must be finite"),
        ({"image": "fox.png"}, TypeError, "`image` must be PIL images, arrays or tensors"),
        (
            {"image": torch.zeros(1, 4, 8, 8)},
            ValueError,
            "must be left out where `image` is latents",
        ),
        ({"image": random_image(), "strength": 0}, ValueError, "`strength` must be above 0 and at most 1, got 0"),
        ({"image": random_image(), "strength": "weak"}, TypeError, "`strength` must be a number"),
        (
            {"image": random_image(number=3), "prompt": ["a", "b"]},
            ValueError,
            "`image` must have one image, or one for each",
        ),
    ],
)
def test_wrong_arguments(ours, arguments, error, message):
    with pytest.raises(error, match=message):
        ours(**{**CALL, **arguments})
