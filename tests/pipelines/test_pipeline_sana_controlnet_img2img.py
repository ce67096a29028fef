"""`SanaControlNetImg2ImgPipeline`: between text-to-image with a ControlNet and image-to-image without."""

import diffusers
import pytest
import torch

import diffusers_sana
from tests.numerics import assert_close_fp32, relative_error
from tests.pipelines.controlnet_cases import CAT, EDGES, generate, options, pipeline


@pytest.fixture(scope="module")
def ours():
    return pipeline()


@pytest.fixture
def img2img(ours):
    return diffusers_sana.SanaControlNetImg2ImgPipeline.from_pipe(ours)


def test_at_full_strength_is_text_to_image(img2img, ours):
    image = {"image": 1 - EDGES, "num_images_per_prompt": 2}
    assert_close_fp32(generate(img2img, **image, strength=1.0), generate(ours, num_images_per_prompt=2))


def test_is_found_by_name_and_by_task(img2img, ours, tmp_path):
    img2img.save_pretrained(tmp_path / "folder")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(pipe) is diffusers_sana.SanaControlNetImg2ImgPipeline
    assert type(pipe.controlnet) is diffusers_sana.SanaControlNetModel
    diffusers_sana.SanaPipeline.from_pipe(ours).save_pretrained(tmp_path / "plain")
    auto = diffusers.AutoPipelineForImage2Image.from_pretrained(tmp_path / "plain", controlnet=ours.controlnet)
    assert type(auto) is diffusers_sana.SanaControlNetImg2ImgPipeline


def test_follows_both_images(img2img, ours):
    plain = diffusers_sana.SanaImg2ImgPipeline.from_pipe(ours)
    half = {"image": 1 - EDGES, "strength": 0.5}
    off = generate(img2img, **half, controlnet_conditioning_scale=0.0)
    assert torch.equal(off, plain(CAT, **{k: v for k, v in options(half).items() if k != "control_image"}).images)
    assert relative_error(generate(img2img, **half), off) > 1e-3
    assert relative_error(generate(img2img, **half | {"image": EDGES}), generate(img2img, **half)) > 1e-3
    with pytest.raises(ValueError, match="`control_image` must be given"):
        generate(img2img, **half, control_image=None)
    with pytest.raises(ValueError, match="size of generation where it is a tensor, 32 by 32"):
        generate(img2img, **half, control_image=torch.zeros(1, 3, 64, 32))
