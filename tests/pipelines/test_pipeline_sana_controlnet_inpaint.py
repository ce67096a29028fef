"""`SanaControlNetInpaintPipeline`: between inpainting without a ControlNet and image-to-image with one."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_sana
from tests.numerics import assert_close_fp32, relative_error
from tests.pipelines.controlnet_cases import CAT, EDGES, generate, options, pipeline


MASK = np.zeros((1, 32, 32), np.float32)
MASK[:, 8:24, 8:24] = 1
GIVEN = {"image": 1 - EDGES, "mask_image": MASK, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def inpaint():
    return diffusers_sana.SanaControlNetInpaintPipeline.from_pipe(pipeline())


def plain(pipe, **changes):
    other = diffusers_sana.SanaInpaintPipeline.from_pipe(pipe)
    return other(CAT, **{name: value for name, value in options(changes).items() if name != "control_image"}).images


@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_off_is_inpainting(inpaint, output_type):
    given = GIVEN | {"output_type": output_type, "strength": 0.7}
    assert torch.equal(generate(inpaint, **given, controlnet_conditioning_scale=0.0), plain(inpaint, **given))
    assert relative_error(generate(inpaint, **given), plain(inpaint, **given)) > 1e-3


def test_with_a_mask_of_everything_is_image_to_image(inpaint):
    given = {"image": 1 - EDGES, "strength": 0.7, "num_inference_steps": 3}
    img2img = diffusers_sana.SanaControlNetImg2ImgPipeline.from_pipe(inpaint)
    assert_close_fp32(generate(inpaint, **given, mask_image=np.ones_like(MASK)), generate(img2img, **given))


def test_keeps_what_is_not_masked(inpaint):
    images = generate(inpaint, **GIVEN, output_type="pt")
    kept = torch.from_numpy(GIVEN["image"]).movedim(-1, 1)
    outside = torch.from_numpy(MASK[0] == 0)
    assert torch.equal(images[..., outside], kept[..., outside])
    assert not torch.equal(images[..., ~outside], kept[..., ~outside])


def test_the_control_image_is_cut_with_the_image(inpaint):
    """What is generated around the mask sees that part of the control image alone."""
    other = EDGES.copy()
    other[:, :6] = 1 - other[:, :6]  # outside of the part
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append(tensors["control_image"])
        return {}

    for control_image in (EDGES, other, EDGES[:, ::-1].copy()):
        names = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["control_image"]}
        changes = GIVEN | {"control_image": control_image, "num_inference_steps": 1}
        generate(
            inpaint, **changes, padding_mask_crop=2, height=None, width=None, use_resolution_binning=True, **names
        )
    assert torch.equal(seen[0], seen[1])
    assert relative_error(seen[2], seen[0]) > 1e-2
    part = torch.from_numpy(EDGES[:, 6:26, 6:26]).movedim(-1, 1)
    resized = torch.nn.functional.interpolate(part, size=(32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    latents = inpaint.vae.encode(resized * 2 - 1).latent * inpaint.vae.config.scaling_factor
    assert_close_fp32(seen[0], latents)


def test_any_size_of_control_image(inpaint):
    small = Image.fromarray((EDGES[0] * 255).astype(np.uint8)).resize((16, 16), Image.Resampling.NEAREST)
    assert generate(inpaint, **GIVEN, control_image=small).shape == generate(inpaint, **GIVEN).shape
    with pytest.raises(ValueError, match="size of generation where it is a tensor, 32 by 32"):
        generate(inpaint, **GIVEN, control_image=torch.zeros(1, 3, 64, 32))


def test_is_found_by_name_and_by_task(inpaint, tmp_path):
    inpaint.save_pretrained(tmp_path / "folder")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(pipe) is diffusers_sana.SanaControlNetInpaintPipeline
    diffusers_sana.SanaPipeline.from_pipe(inpaint).save_pretrained(tmp_path / "plain")
    auto = diffusers.AutoPipelineForInpainting.from_pretrained(tmp_path / "plain", controlnet=inpaint.controlnet)
    assert type(auto) is diffusers_sana.SanaControlNetInpaintPipeline
