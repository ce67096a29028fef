"""The pipelines of SANA-Video 2.0: with guidance, with an image, and in four steps."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sana import (
    FlowDPMSolverScheduler,
    SanaVideo2Pipeline,
    SanaVideo2PreviewPipeline,
    SanaVideo2Transformer3DModel,
)
from diffusers_sana.pipelines.pipeline_sana_video2 import PREVIEW_SIGMAS
from tests import tiny, tiny_video
from tests.models.sana_transformers import excite
from tests.models.test_transformer_sana_video2 import TINY
from tests.numerics import assert_close_fp32, relative_error


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
SIZE = {"height": 8, "width": 8, "frames": 5, "complex_human_instruction": None, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    """Two frames and 2 x 2 pixels to a latent; natively 24 x 42 pixels."""
    torch.manual_seed(0)
    config = TINY | {"in_channels": 16, "caption_channels": tiny.TEXT_WIDTH, "sample_size": 12, "rope_max_seq_len": 32}
    made = SanaVideo2Pipeline(
        tiny.tokenizer(),
        tiny.text_encoder(),
        tiny_video.ltx_vae(),
        excite(SanaVideo2Transformer3DModel(**config)).eval(),
        FlowDPMSolverScheduler(flow_shift=12.0),
    )
    made.set_progress_bar_config(disable=True)
    return made


def generate(pipe, prompt="a cat", **changes):
    seeded = {"generator": torch.Generator().manual_seed(3)}
    few = {} if isinstance(pipe, SanaVideo2PreviewPipeline) else {"num_inference_steps": 2}
    return pipe(prompt, **SIZE | seeded | few | changes).frames


def features(pipe, prompt):
    embeds, mask, _, _ = pipe.encode_prompt(prompt, False, complex_human_instruction=None)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


@torch.no_grad()
def test_guided_euler_steps(pipe):
    """Against the loop written out."""
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=12.0)
    euler_pipe = SanaVideo2Pipeline.from_pipe(pipe, scheduler=euler)
    noise = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    made = generate(euler_pipe, latents=noise, guidance_scale=3.0, negative_prompt="ugly")
    euler.set_timesteps(2)
    latents = noise
    for time, sigma, after in zip(euler.timesteps, euler.sigmas, euler.sigmas[1:], strict=False):
        positive, negative = (
            pipe.transformer(latents, timestep=time[None], **features(pipe, text)).sample for text in ("a cat", "ugly")
        )
        latents = latents + (after - sigma) * (negative + 3.0 * (positive - negative))
    assert_close_fp32(made, latents)


@torch.no_grad()
def test_the_first_frame_is_the_image(pipe):
    """At time 0 throughout, while the others are stepped."""
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=12.0)
    euler_pipe = SanaVideo2Pipeline.from_pipe(pipe, scheduler=euler)
    noise = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    kept = noise.clone()
    made = generate(euler_pipe, latents=noise, image=IMAGE.resize((8, 8)), guidance_scale=1.0)
    assert torch.equal(noise, kept)
    pixels = torch.as_tensor(np.array(IMAGE.resize((8, 8)))).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    mean, std = (value.view(-1, 1, 1, 1) for value in (pipe.vae.latents_mean, pipe.vae.latents_std))
    first = (pipe.vae.encode(pixels).latent_dist.mode() - mean) / std
    assert_close_fp32(made[:, :, :1], first)
    euler.set_timesteps(2)
    latents = torch.cat([first, noise[:, :, 1:]], dim=2)
    for time, sigma, after in zip(euler.timesteps, euler.sigmas, euler.sigmas[1:], strict=False):
        times = time * torch.tensor([[0.0, 1.0, 1.0]])
        velocity = pipe.transformer(latents, timestep=times, **features(pipe, "a cat")).sample
        latents = torch.cat([first, latents[:, :, 1:] + (after - sigma) * velocity[:, :, 1:]], dim=2)
    assert_close_fp32(made, latents)


def test_sizes(pipe):
    """By default 16:9, with an image its proportions at the same number of pixels; the solver of the authors."""
    video = generate(pipe, height=None, width=None, output_type="pt", frames=3)
    assert video.shape == (1, 3, 3, 24, 42)
    high = generate(pipe, image=IMAGE.resize((20, 40)), height=None, width=None, output_type="pil", frames=3)
    assert high[0][0].size == (22, 44)
    assert len(generate(pipe, ["a cat", "a dog"], image=IMAGE, num_videos_per_prompt=2)) == 4


def test_four_steps(pipe):
    """The preview, against the formula: x0 = x - sigma v, then fresh noise of the next level; no guidance."""
    preview = SanaVideo2PreviewPipeline.from_pipe(pipe)
    preview.set_progress_bar_config(disable=True)
    made = generate(preview)
    noise = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 3, 4, 4, generator=noise)
    for index, (sigma, time) in enumerate(zip(PREVIEW_SIGMAS, (999, 947, 856, 666), strict=True)):
        if index:
            latents = (1 - sigma) * latents + sigma * torch.randn(latents.shape, generator=noise)
        with torch.no_grad():
            velocity = pipe.transformer(latents, timestep=torch.tensor([float(time)]), **features(pipe, "a cat"))
        latents = latents - sigma * velocity.sample
    assert_close_fp32(made, latents)
    assert torch.equal(generate(preview, sigmas=[*PREVIEW_SIGMAS, 0]), made)
    assert relative_error(generate(preview, sigmas=PREVIEW_SIGMAS[:2]), made) > 1e-2
    shifted = [6 * u / (1 + 5 * u) for u in (0.999, 0.74925, 0.4995, 0.24975)]
    assert pytest.approx(shifted, abs=1e-7) == PREVIEW_SIGMAS


def test_folders(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = generate(pipe)
    for cls in (SanaVideo2Pipeline, diffusers.DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is SanaVideo2Pipeline
        loaded.set_progress_bar_config(disable=True)
        assert_close_fp32(generate(loaded), expected)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"frames": 4}, "`frames`"),
        ({"height": 7}, "`height`"),
        ({"prompt": None}, "`prompt`"),
        ({"sigmas": [0.5, 0.9]}, "`sigmas`"),
        ({"sigmas": [1.5]}, "`sigmas`"),
        ({"sigmas": []}, "`sigmas`"),
    ],
)
def test_wrong_arguments_of_the_preview(pipe, changes, match):
    with pytest.raises(ValueError, match=match):
        generate(SanaVideo2PreviewPipeline.from_pipe(pipe), **changes)


def test_no_step_cache_with_the_preview(pipe):
    pipe.transformer.enable_cache(diffusers.TaylorSeerCacheConfig())
    try:
        with pytest.raises(ValueError, match="A step cache cannot be used with so few steps"):
            generate(SanaVideo2PreviewPipeline.from_pipe(pipe))
    finally:
        pipe.transformer.disable_cache()


def test_wrong_images(pipe):
    with pytest.raises(ValueError, match="image_fit"):
        generate(pipe, image=IMAGE.resize((8, 16)), image_fit="stretch")
    with pytest.raises(ValueError, match="`image_fit`"):
        generate(pipe, image=IMAGE, image_fit="no")
