"""`guider=` in the pipelines of SANA-Video, against the formulas of `test_guiders.py`."""

import copy
from functools import partial

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance

import diffusers_sana
from diffusers_sana.pipelines.changed_layers import blurred
from diffusers_sana.pipelines.video_decoding import encode_videos
from tests import tiny_video
from tests.numerics import assert_close_fp32, relative_error
from tests.pipelines.test_guiders import CAT, GUIDERS, STEPS, kornia, projected, unchanged


__all__ = ["kornia"]  # a fixture

SHAPE = (1, 16, 3, 16, 16)
SIZE = {"height": 128, "width": 128, "frames": 9, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def ours():
    return tiny_video.pipeline(diffusers_sana)


def noise():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def generate(pipe, **kwargs):
    return tiny_video.generate(pipe, CAT, negative_prompt="ugly", **SIZE | {"latents": noise()} | kwargs)


def frame_by_frame(formula):
    """The formula for the frames as images."""

    def of_video(step, p, memory):
        return formula(step, lambda **options: p(**options)[0].transpose(0, 1), memory).transpose(0, 1)[None]

    return of_video


@torch.no_grad()
def by_hand(pipe, formula, first=None):
    """The loop, with the latent frame of an image as the `first`, which is not guided and not stepped."""
    texts = pipe.encode_prompt(CAT, negative_prompt="ugly")
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    latents, memory = noise(), {}
    kept = 0 if first is None else 1
    if first is not None:
        latents[:, :, :1] = first

    def predict(latents, t, negative=False, change=unchanged):
        text, mask = texts[2:] if negative else texts[:2]
        times = t.float().expand(1, SHAPE[2]).clone()
        times[:, :kept] = 0
        with change(pipe.transformer):
            output = pipe.transformer(latents, text, times, encoder_attention_mask=mask, return_dict=False)
        return output[0][:, :, kept:].double()

    for step, t in enumerate(scheduler.timesteps):
        guided = formula(step, partial(predict, latents, t), memory).float()
        moved = scheduler.step(guided, t, latents[:, :, kept:], return_dict=False)[0]
        latents = torch.cat([latents[:, :, :kept], moved], dim=2)
    return latents


@pytest.mark.parametrize(
    "name",
    ["CFG, rescaled", "interval", "CFG-Zero*", "APG", "TCFG", "MaG", "FDG", "AutoGuidance, feed-forward", "SLG"],
)
def test_formula(name, ours):
    make, formula = GUIDERS[name]
    expected = by_hand(ours, frame_by_frame(formula) if name == "FDG" else formula)
    assert_close_fp32(generate(ours, guider=make()), expected, 1e-4)


def test_an_image_is_not_guided():
    """Norms of a guider are of the frames that are denoised."""
    pipe = tiny_video.pipeline(diffusers_sana, "SanaImageToVideoPipeline")
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    image = (image * 255).round() / 255
    guider = AdaptiveProjectedGuidance(5.0, -0.5, adaptive_projected_guidance_rescale=8.0, eta=0.3)
    expected = by_hand(pipe, projected(5.0, -0.5, 8.0, 0.3), encode_videos(pipe.vae, image.unsqueeze(2) * 2 - 1))
    assert_close_fp32(generate(pipe, image=image, guider=guider), expected, 1e-4)


def test_plain_guidance_is_the_default(ours):
    assert_close_fp32(generate(ours, guider=ClassifierFreeGuidance(6.0)), generate(ours))
    with pytest.raises(ValueError, match="`guidance_scale` must not be given with `guider`"):
        generate(ours, guider=ClassifierFreeGuidance(6.0), guidance_scale=4.5)


def test_perturbed_attention_and_blur_work(ours):
    plain = generate(ours)
    made = {name: generate(ours, guider=GUIDERS[name][0]()) for name in ("PAG", "SEG", "SEG, sigma 1.5")}
    assert all(relative_error(video, plain) > 1e-4 for video in made.values())


def test_frames_are_blurred_alone():
    frames = torch.randn(2, 3, 48, 5)
    for sigma in (1.5, float("inf")):
        each = torch.stack([blurred(frames[:, index], (8, 6), sigma) for index in range(3)], dim=1)
        assert torch.equal(blurred(frames.flatten(1, 2), (8, 6), sigma), each.flatten(1, 2))
