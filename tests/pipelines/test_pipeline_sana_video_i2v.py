"""`SanaImageToVideoPipeline` makes what diffusers' pipeline makes, and where that one is wrong, what is right."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

import diffusers_sana
from tests import tiny, tiny_video
from tests.numerics import assert_close_fp32, relative_error


NAME = "SanaImageToVideoPipeline"
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
WIDE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 60, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def ours():
    return tiny_video.pipeline(diffusers_sana, NAME)


@pytest.fixture(scope="module")
def upstream():
    return tiny_video.pipeline(diffusers, NAME)


def generate(pipe, prompt="a cat", **kwargs):
    return tiny_video.generate(pipe, prompt, **{"image": IMAGE} | kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"negative_prompt": "ugly", "frames": 9},
        {"image": WIDE},
        {"prompt": ["a cat", "a dog"]},
        {"guidance_scale": 1.0, "output_type": "pt"},
    ],
)
def test_equals_diffusers(ours, upstream, kwargs):
    assert_close_fp32(generate(ours, **kwargs), generate(upstream, **kwargs), tolerance=1e-5)


def test_equals_diffusers_with_its_scheduler_and_components(upstream):
    parts = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)}
    theirs = tiny_video.pipeline(diffusers, NAME, parts)
    expected = generate(theirs)
    assert_close_fp32(generate(tiny_video.pipeline(diffusers_sana, NAME, parts)), expected)
    ours = diffusers_sana.SanaImageToVideoPipeline(**theirs.components)  # whose transformer takes times of tokens
    ours.set_progress_bar_config(disable=True)
    assert_close_fp32(generate(ours), expected)


def test_ltx_autoencoder_equals_diffusers():
    ours, upstream = (
        tiny_video.pipeline(library, NAME, {"vae": tiny_video.ltx_vae()}) for library in (diffusers_sana, diffusers)
    )
    assert_close_fp32(generate(ours), generate(upstream))


def test_the_first_frame_is_the_image(ours):
    latents = generate(ours)
    config = ours.vae.config
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.latents_mean, config.latents_std))
    pixels = torch.as_tensor(np.array(IMAGE)).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.no_grad():
        encoded = ours.vae.encode(pixels).latent_dist.mode()[0, :, 0]
    assert_close_fp32(latents[0, :, 0], (encoded - mean) / std)


def test_several_videos_per_prompt(ours, upstream):
    """diffusers makes a mask for one video per prompt, and fails."""
    with pytest.raises(RuntimeError):
        generate(upstream, num_videos_per_prompt=2)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    prompts, images = ["a cat", "a dog"], [IMAGE, IMAGE.rotate(90)]
    batch = generate(ours, prompts, image=images, num_videos_per_prompt=2, generator=generators)
    assert batch.shape[0] == 4
    for index in range(4):
        alone = generate(
            ours, prompts[index // 2], image=images[index // 2], generator=torch.Generator().manual_seed(index)
        )
        assert_close_fp32(batch[index : index + 1], alone)


def test_latents_stay_as_they_are(ours, upstream):
    """diffusers writes the image into the caller's tensor."""
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    before = noise.clone()
    out = generate(ours, latents=noise, generator=None)
    assert torch.equal(noise, before)
    assert torch.equal(out, generate(ours))
    assert_close_fp32(out, generate(upstream, latents=noise, generator=None))
    assert not torch.equal(noise, before)


def test_autoencoder_of_images():
    vae = tiny.vae(diffusers_sana)
    pipe = tiny_video.pipeline(diffusers_sana, NAME, {"vae": vae}, in_channels=4, out_channels=4)
    image = IMAGE.resize((8, 8))
    frames = generate(pipe, image=image, height=8, width=8, frames=3, output_type="pt")
    pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = vae.decode(vae.encode(pixels).latent).sample
    assert_close_fp32(frames[:, 0], (expected / 2 + 0.5).clamp(0, 1))


def test_cropping_keeps_the_proportions(ours):
    tall = Image.new("RGB", (32, 64))
    tall.paste(IMAGE, (0, 16))
    assert_close_fp32(generate(ours, image=tall, image_fit="crop"), generate(ours))
    assert relative_error(generate(ours, image=WIDE, image_fit="crop"), generate(ours, image=WIDE)) > 1e-3


def test_size_defaults_to_the_proportions_of_the_image(ours, monkeypatch):
    monkeypatch.setattr(ours.transformer, "_internal_dict", FrozenDict({**ours.transformer.config, "sample_size": 30}))
    seen = []

    def stop(request, size):
        seen.append(size)
        raise StopIteration

    monkeypatch.setattr(ours, "_check", stop)
    sizes = {"height": None, "width": None, "use_resolution_binning": True}
    for image, kwargs in (
        (Image.new("RGB", (500, 500)), {}),
        (Image.new("RGB", (900, 1600)), {}),
        (IMAGE, {"height": 480}),
    ):
        with pytest.raises(StopIteration):
            generate(ours, image=image, **sizes | kwargs)
    assert seen == [(624, 624), (832, 480), (480, 832)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image": None}, "`image` must be given, got None. Use SanaVideoPipeline"),
        ({"image": IMAGE.resize((64, 32))}, "`image` must have about the proportions.*image_fit='crop'"),
        ({"image_fit": "pad"}, "`image_fit` must be one of"),
        ({"image": [IMAGE] * 3}, "`image` must have one image"),
        ({"frames": 4}, "`frames` must be one more than a multiple of 4"),
    ],
)
def test_wrong_arguments(ours, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(ours, **kwargs)


def test_without_an_autoencoder():
    pipe = tiny_video.pipeline(diffusers_sana, NAME, {"vae": None})
    with pytest.raises(ValueError, match="`image` needs an autoencoder"):
        generate(pipe)


def test_shares_components_with_text_to_video(ours):
    pipe = diffusers_sana.SanaVideoPipeline.from_pipe(ours)
    assert pipe.transformer is ours.transformer
    assert type(diffusers_sana.SanaImageToVideoPipeline.from_pipe(pipe)) is diffusers_sana.SanaImageToVideoPipeline
