"""`SanaImg2ImgPipeline`: begins where `strength` says, at the noise level of that step, from the given image."""

from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_sana
from tests import tiny
from tests.numerics import assert_close_fp32


STEPS = 5
PROMPT = "a cat"

generate = partial(tiny.generate, num_inference_steps=STEPS)


def random_image(height=32, width=32, seed=0):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pipe(ours):
    return diffusers_sana.SanaImg2ImgPipeline.from_pipe(ours)


def test_values_below_0_are_taken_for_the_range_around_0(pipe):
    assert_close_fp32(generate(pipe, image=random_image() * 2 - 1), generate(pipe, image=random_image()))


@torch.no_grad()
def by_diffusers(upstream, scheduler, image, begin):
    """The same in diffusers' models and scheduler, step by step."""
    embeds, mask, negative, negative_mask = upstream.encode_prompt(PROMPT)
    text = {
        "encoder_hidden_states": torch.cat([negative, embeds]),
        "encoder_attention_mask": torch.cat([negative_mask, mask]),
    }
    z = upstream.vae.encode(2 * image - 1).latent * upstream.vae.config.scaling_factor
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(begin)
    first = scheduler.timesteps[begin : begin + 1]
    if hasattr(scheduler, "scale_noise"):
        latents = scheduler.scale_noise(z, first, noise)
    else:
        latents = scheduler.add_noise(z, noise, first)
    for t in scheduler.timesteps[begin:]:
        negative, positive = upstream.transformer(torch.cat([latents, latents]), timestep=t.expand(2), **text)[
            0
        ].chunk(2)
        latents = scheduler.step(negative + 4.5 * (positive - negative), t, latents)[0]
    return latents


@pytest.mark.parametrize("name", ["FlowDPMSolver", "DPMSolver", "FlowMatchEuler"])
def test_equals_the_steps_of_diffusers(ours, upstream, name):
    theirs = upstream.scheduler
    if name == "FlowMatchEuler":
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = type(theirs).from_config(theirs.config)
    scheduler = ours.scheduler if name == "FlowDPMSolver" else type(theirs).from_config(theirs.config)
    pipe = diffusers_sana.SanaImg2ImgPipeline(**ours.components | {"scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    actual = generate(pipe, image=random_image(), strength=0.6)
    assert_close_fp32(actual, by_diffusers(upstream, theirs, random_image(), begin=2), tolerance=1e-4)
    assert pipe.num_timesteps == 3


@pytest.mark.parametrize("strength", [1.0, 0.95])
def test_strength_1_is_text_to_image(ours, pipe, strength):
    assert torch.equal(generate(pipe, image=random_image(), strength=strength), generate(ours))


@pytest.mark.parametrize(
    ("strength", "steps", "left"),
    [(0.6, 20, 12), (0.59, 20, 12), (0.61, 20, 13), (0.1, 30, 3), (0.7, 20, 14), (1, 1, 1)],
)
def test_number_of_steps(pipe, strength, steps, left):
    count = []
    callback = lambda pipe, step, t, tensors: setattr(pipe, "_interrupt", True) or count.append(step)  # noqa: E731
    generate(pipe, image=random_image(), strength=strength, num_inference_steps=steps, callback_on_step_end=callback)
    assert pipe.num_timesteps == left
    assert len(count) == 1


def test_less_strength_stays_nearer_to_the_image(pipe):
    with torch.no_grad():
        z = pipe.vae.encode(2 * random_image() - 1).latent * pipe.vae.config.scaling_factor
    distances = [(generate(pipe, image=random_image(), strength=s) - z).norm() for s in (0.2, 0.6, 1.0)]
    assert distances[0] < distances[1] < distances[2]


def test_same_seed_same_bits(pipe):
    assert torch.equal(generate(pipe, image=random_image()), generate(pipe, image=random_image()))
    assert not torch.equal(generate(pipe, image=random_image()), generate(pipe, image=random_image(), seed=4))


def test_the_scheduler_of_the_next_pipeline_begins_at_its_beginning(ours, pipe):
    before = generate(ours)
    generate(pipe, image=random_image())
    assert torch.equal(generate(ours), before)


def test_custom_schedules(pipe, ours):
    ours.scheduler.set_timesteps(STEPS)
    grid = ours.scheduler.timesteps.tolist()
    given = generate(pipe, image=random_image(), timesteps=grid, num_inference_steps=1)
    assert pipe.num_timesteps == 3
    assert_close_fp32(given, generate(pipe, image=random_image()), tolerance=2e-2)  # timesteps are truncated
    assert generate(pipe, image=random_image(), sigmas=[0.9, 0.4], strength=0.5).isfinite().all()
    assert pipe.num_timesteps == 1


class TestImages:
    def test_forms(self, pipe):
        data = (random_image() * 255).round().to(torch.uint8)
        array = data[0].movedim(0, -1).numpy()
        expected = generate(pipe, image=Image.fromarray(array))
        forms = [[Image.fromarray(array)], array, array[None], array / np.float32(255), data, data[0], data / 255]
        for form in forms:
            assert torch.equal(generate(pipe, image=form), expected)

    def test_gray_and_transparent(self, pipe):
        gray = Image.fromarray((random_image()[0, 0] * 255).byte().numpy())
        expected = generate(pipe, image=gray.convert("RGB"))
        for form in (gray, gray.convert("RGBA"), np.array(gray), torch.tensor(np.array(gray))[None] / 255):
            assert torch.equal(generate(pipe, image=form), expected)

    def test_latents(self, pipe):
        with torch.no_grad():
            z = pipe.vae.encode(2 * random_image(32, 48) - 1).latent * pipe.vae.config.scaling_factor
        image = {"image": random_image(32, 48), "use_resolution_binning": False}
        assert torch.equal(generate(pipe, image=z), generate(pipe, **image))
        assert torch.equal(generate(pipe, image=z, output_type="pt"), generate(pipe, **image, output_type="pt"))

    def test_latents_of_text_to_image(self, ours, pipe):
        assert generate(pipe, image=generate(ours), output_type="pil")[0].size == (32, 32)

    def test_noise_as_latents(self, pipe):
        noise = torch.randn(1, tiny.LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(3))
        given = generate(pipe, image=random_image(), latents=noise, generator=None)
        assert torch.equal(given, generate(pipe, image=random_image()))

    def test_noise_as_latents_decides_on_the_size(self, pipe):
        given = generate(pipe, image=random_image(), latents=torch.zeros(1, tiny.LATENT_CHANNELS, 8, 20))
        assert given.shape[-2:] == (8, 20)


class TestSizes:
    """32 pixels native size, without a table of trained sizes."""

    @pytest.mark.parametrize(
        ("size", "arguments", "generated"),
        [
            ((64, 64), {}, (32, 32)),
            ((50, 50), {}, (32, 32)),
            ((30, 60), {}, (22, 46)),
            ((64, 64), {"use_resolution_binning": False}, (64, 64)),
            ((50, 50), {"height": 20}, (20, 50)),
            ((50, 50), {"height": 20, "width": 40}, (20, 40)),
        ],
    )
    def test_generated_and_returned(self, pipe, size, arguments, generated):
        latents = generate(pipe, image=random_image(*size), **arguments)
        assert latents.shape[-2:] == (generated[0] // 2, generated[1] // 2)
        image = generate(pipe, image=random_image(*size), **arguments, output_type="pt")
        assert image.shape[-2:] == (arguments.get("height", size[0]), arguments.get("width", size[1]))

    def test_with_a_table(self):
        pipe = tiny.pipeline(diffusers_sana, num_stages=6)  # 512 pixels native size
        pipe = diffusers_sana.SanaImg2ImgPipeline.from_pipe(pipe)
        arguments = {"image": random_image(300, 280), "num_inference_steps": 1, "strength": 1.0}
        assert generate(pipe, **arguments).shape[-2:] == (512 // 32, 480 // 32)
        assert generate(pipe, **arguments, output_type="np").shape == (1, 300, 280, 3)


class TestBatches:
    def test_equal_single_images(self, pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        images = [random_image(seed=5), random_image(seed=6)]
        prompts = ["a cat", "a dog"]
        batch = generate(
            pipe, prompts, image=images, negative_prompt=["x", "yy"], num_images_per_prompt=2, generator=generators
        )
        for i in range(4):
            single = generate(pipe, prompts[i // 2], seed=i, image=images[i // 2], negative_prompt=["x", "yy"][i // 2])
            assert_close_fp32(batch[i : i + 1], single)

    def test_one_prompt_for_several_images(self, pipe):
        images = torch.cat([random_image(seed=5), random_image(seed=6)])
        assert torch.equal(generate(pipe, image=images), generate(pipe, [PROMPT, PROMPT], image=images))

    def test_one_image_for_several_prompts(self, pipe):
        both = generate(pipe, ["a", "b"], image=random_image())
        assert_close_fp32(both, generate(pipe, ["a", "b"], image=[random_image()[0], random_image()[0]]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": None}, ValueError, "`image` must be given, got None"),
        ({"strength": 0}, ValueError, "`strength` must be above 0 and at most 1, got 0"),
        ({"strength": 1.01}, ValueError, "`strength` must be above 0 and at most 1, got 1.01"),
        ({"strength": torch.nan}, ValueError, "`strength` must be above 0"),
        ({"strength": "0.5"}, TypeError, "`strength` must be a number"),
        ({"strength": 0.1}, ValueError, r"`strength` times the number of steps must be at least 1, got 0.1 \* 5"),
        ({"strength": 0.3, "sigmas": [0.9, 0.5]}, ValueError, r"at least 1, got 0.3 \* 2"),
        ({"image": "cat.png"}, TypeError, "`image` must be PIL images, arrays or tensors, one or a list, got str"),
        ({"image": []}, ValueError, "`image` must have at least one image"),
        ({"image": random_image() * torch.inf}, ValueError, "`image` must be finite"),
        ({"image": random_image() * torch.nan}, ValueError, "`image` must be finite"),
        (
            {"image": random_image().long()},
            TypeError,
            r"`image` must hold floats in \[0, 1\], booleans or integers of 8 or 16",
        ),
        ({"image": torch.zeros(1, 2, 32, 32)}, ValueError, r"`image` must have 3 color channels.*\[1, 2, 32, 32\]"),
        (
            {"image": [random_image(), random_image(64, 32)]},
            ValueError,
            r"`image` must have images of one size.*\(64, 32\)",
        ),
        (
            {"image": [random_image()] * 2, "prompt": ["a"] * 3},
            ValueError,
            "`image` must have one image, or one for each",
        ),
        ({"image": torch.full((1, 4, 16, 16), torch.inf)}, ValueError, "`image` must be finite"),
        ({"image": torch.zeros(1, 4, 16, 16), "height": 32}, ValueError, "`height` and `width` must be left out"),
        ({"height": 0}, ValueError, "`height` must be at least 1"),
        ({"width": 32.0}, TypeError, "`width` must be an integer"),
        (
            {"image": random_image(33, 32), "use_resolution_binning": False},
            ValueError,
            "`height` must be a multiple of 2, got 33. Use 32 or 34.",
        ),
        ({"latents": torch.zeros(1, 3, 16, 16)}, ValueError, r"`latents` must have the shape \[1, 4, 16, 16\]"),
        ({"prompt": None}, ValueError, "Exactly one of `prompt` and `prompt_embeds`"),
    ],
)
def test_refused(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        generate(pipe, **{"image": random_image(), "prompt": PROMPT, **arguments})


def test_without_autoencoder(ours):
    pipe = diffusers_sana.SanaImg2ImgPipeline(**ours.components | {"vae": None})
    with pytest.raises(ValueError, match="`image` must be latents, because this pipeline was made without"):
        generate(pipe, image=random_image())


def test_scheduler_without_noise_levels(ours):
    pipe = diffusers_sana.SanaImg2ImgPipeline(**ours.components | {"scheduler": diffusers.DDPMScheduler()})
    with pytest.raises(TypeError, match=r"`scheduler` must be a solver of flows.*DDPMScheduler"):
        generate(pipe, image=random_image())
