"""`SanaPipeline` makes what diffusers' pipeline makes, and where that one is wrong, what is right."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_sana
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION
from tests import tiny
from tests.numerics import assert_close_fp32


STEPS = 3
CAT, DOG = "A cat, sleeping", "a dog that has eaten too much"


def generate(pipe, prompt=CAT, seed=3, **kwargs):
    kwargs = {"num_inference_steps": STEPS, "output_type": "latent", "height": 32, "width": 32, **kwargs}
    kwargs.setdefault("use_resolution_binning", False)
    kwargs.setdefault("generator", None if "latents" in kwargs else torch.Generator().manual_seed(seed))
    return pipe(prompt, **kwargs).images


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"complex_human_instruction": None},
        {"complex_human_instruction": ["Draw:", ""]},
        {"negative_prompt": "ugly"},
        {"prompt": [CAT, DOG], "negative_prompt": ["ugly", "a very dark photograph"]},
        {"prompt": ["", DOG]},
        {"guidance_scale": 1.0},
        {"max_sequence_length": 8},
        {"clean_caption": True, "prompt": "a <b>cat</b> &amp; a dog https://example.com"},
        {"num_images_per_prompt": 2},
        {"height": 32, "width": 64},
        {"output_type": "pt"},
    ],
    ids=str,
)
def test_equals_diffusers(ours, upstream, kwargs):
    assert_close_fp32(generate(ours, **kwargs), generate(upstream, **kwargs), tolerance=1e-5)


@pytest.mark.parametrize("changes", [{"qk_norm": "rms_norm_across_heads"}, {"interpolation_scale": 1.0}], ids=str)
def test_equals_diffusers_with_other_checkpoints(changes):
    ours, upstream = (tiny.pipeline(library, **changes) for library in (diffusers_sana, diffusers))
    assert_close_fp32(generate(ours), generate(upstream), tolerance=1e-5)


def test_equals_diffusers_with_binning():
    # 512 pixels native size, the smallest that has a table: the nearest trained size to 300x280 is 512x480.
    arguments = {"height": 300, "width": 280, "use_resolution_binning": True, "num_inference_steps": 1}
    ours, upstream = (tiny.pipeline(library, num_stages=6) for library in (diffusers_sana, diffusers))
    assert_close_fp32(generate(ours, **arguments), generate(upstream, **arguments), tolerance=1e-5)
    images = [generate(pipe, **arguments | {"output_type": "np"}) for pipe in (ours, upstream)]
    assert images[0].shape == (1, 300, 280, 3)
    np.testing.assert_allclose(*images, atol=1e-4)


def test_runs_components_of_diffusers(upstream):
    pipe = diffusers_sana.SanaPipeline(**upstream.components)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.transformer) is diffusers.SanaTransformer2DModel
    assert_close_fp32(generate(pipe, [CAT, DOG]), generate(upstream, [CAT, DOG]))


def test_same_seed_same_bits(ours):
    assert torch.equal(generate(ours), generate(ours))
    assert not torch.equal(generate(ours), generate(ours, seed=4))


def test_signature_is_that_of_diffusers():
    images = ["ip_adapter_image", "ip_adapter_image_embeds"]
    more = {"__call__": ["guider", "share_prompt_mask", *images], "encode_prompt": ["share_prompt_mask"]}
    for method in ("__call__", "encode_prompt", "check_inputs", "prepare_latents"):
        theirs = inspect.signature(getattr(diffusers.SanaPipeline, method)).parameters
        ours = inspect.signature(getattr(diffusers_sana.SanaPipeline, method)).parameters
        assert list(ours) == [*theirs, *more.get(method, [])]
        assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in more.get(method, []))


def test_defaults_cannot_be_changed_by_a_caller():
    # diffusers' defaults are lists, which one caller can change for all others.
    for parameter in inspect.signature(diffusers_sana.SanaPipeline.__call__).parameters.values():
        assert not isinstance(parameter.default, list | dict | set)


def test_default_instruction_is_that_of_diffusers():
    parameters = inspect.signature(diffusers.SanaPipeline.__call__).parameters
    assert list(COMPLEX_HUMAN_INSTRUCTION) == parameters["complex_human_instruction"].default


def test_instruction_as_one_text(ours):
    text = "\n".join(COMPLEX_HUMAN_INSTRUCTION)
    assert torch.equal(generate(ours, complex_human_instruction=text), generate(ours))


def test_size_defaults_to_the_checkpoint(ours):
    # diffusers takes 1024 for every checkpoint, and so resamples what the others make.
    arguments = {"num_inference_steps": 1, "output_type": "pil"}
    assert ours(CAT, **arguments).images[0].size == (32, 32)
    assert ours(CAT, height=64, **arguments).images[0].size == (32, 64)


def test_output_types(ours):
    image = generate(ours, output_type="pil")[0]
    assert isinstance(image, Image.Image)
    assert generate(ours, output_type="np").shape == (1, 32, 32, 3)
    assert generate(ours, output_type="pt").shape == (1, 3, 32, 32)
    latents = generate(ours)
    assert latents.shape == (1, tiny.LATENT_CHANNELS, 16, 16)
    assert latents.dtype == torch.float32
    as_tuple = ours(CAT, latents=torch.zeros(1, 4, 16, 16), num_inference_steps=1, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 1


def test_latents_out_decode_to_the_image(ours):
    latents = generate(ours) / ours.vae.config.scaling_factor
    with torch.no_grad():
        image = ours.vae.decode(latents, return_dict=False)[0]
    assert_close_fp32((image / 2 + 0.5).clamp(0, 1), generate(ours, output_type="pt"))


def test_latents_in(ours, upstream):
    noise = torch.randn(1, tiny.LATENT_CHANNELS, 16, 32)
    given = generate(ours, latents=noise, height=None, width=None, use_resolution_binning=True)
    assert given.shape == noise.shape
    assert_close_fp32(given, generate(upstream, latents=noise, height=32, width=64))


def test_latents_in_decide_on_the_size_where_there_is_a_table():
    pipe = tiny.pipeline(diffusers_sana, num_stages=6)  # 512 pixels; 480x448 is not a trained size
    out = pipe(CAT, latents=torch.zeros(1, tiny.LATENT_CHANNELS, 15, 14), num_inference_steps=1, output_type="pt")
    assert out.images.shape == (1, 3, 480, 448)


def test_latents_in_equal_the_generator(ours):
    noise = torch.randn(1, tiny.LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(generate(ours, latents=noise), generate(ours))


def test_images_of_a_batch_equal_single_images(ours):
    """Also the upstream bug: masks in another order than embeds for several prompts and images a prompt."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    batch = generate(ours, [CAT, DOG], negative_prompt=["x", "yyy"], num_images_per_prompt=2, generator=generators)
    for index, (prompt, negative) in enumerate([(CAT, "x"), (CAT, "x"), (DOG, "yyy"), (DOG, "yyy")]):
        assert_close_fp32(batch[index : index + 1], generate(ours, prompt, seed=index, negative_prompt=negative))


def test_negative_prompt_none_is_the_empty_text(ours):
    # diffusers raises inside the tokenizer.
    assert torch.equal(generate(ours, negative_prompt=None), generate(ours, negative_prompt=""))


def test_embeds_in_place_of_texts(ours):
    embeds = ours.encode_prompt([CAT, DOG], negative_prompt="ugly", complex_human_instruction=["Draw:", ""])
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    # With `negative_prompt` left at its default, which diffusers refuses.
    given = generate(ours, None, **dict(zip(names, embeds, strict=True)))
    texts = generate(ours, [CAT, DOG], negative_prompt="ugly", complex_human_instruction=["Draw:", ""])
    assert_close_fp32(given, texts)


def test_prompt_with_embeds_of_the_negative_only(ours):
    _, _, negative, mask = ours.encode_prompt(CAT, negative_prompt="ugly")
    given = generate(ours, negative_prompt_embeds=negative, negative_prompt_attention_mask=mask)
    assert_close_fp32(given, generate(ours, negative_prompt="ugly"))


def test_embeds_shorter_than_the_negative(ours):
    embeds, mask, _, _ = ours.encode_prompt(CAT, do_classifier_free_guidance=False)
    short = generate(ours, None, prompt_embeds=embeds[:, :20], prompt_attention_mask=mask[:, :20])
    assert mask.sum() < 20
    assert_close_fp32(short, generate(ours, complex_human_instruction=None))


def test_without_text_encoder_and_autoencoder(ours):
    embeds = ours.encode_prompt(CAT)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    bare = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = diffusers_sana.SanaPipeline(**ours.components | bare)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae_scale_factor = ours.vae_scale_factor
    given = generate(pipe, None, **dict(zip(names, embeds, strict=True)))
    assert_close_fp32(given, generate(ours, complex_human_instruction=None))


def test_custom_timesteps_and_sigmas(ours):
    # diffusers' DPM-Solver cannot take timesteps with a flow schedule, and never takes sigmas.
    ours.scheduler.set_timesteps(STEPS)
    timesteps = ours.scheduler.timesteps.tolist()
    assert_close_fp32(generate(ours, timesteps=timesteps), generate(ours), tolerance=2e-2)  # truncated to integers
    assert ours.num_timesteps == STEPS
    assert generate(ours, sigmas=[1.0, 0.5]).isfinite().all()
    assert ours.num_timesteps == 2


def test_guidance_is_a_straight_line_between_the_halves(ours):
    noise = torch.randn(1, tiny.LATENT_CHANNELS, 16, 16)
    arguments = {"latents": noise, "num_inference_steps": 1, "complex_human_instruction": None, "prompt": CAT}
    conditional = generate(ours, **arguments, guidance_scale=1.0)
    double, triple = (generate(ours, **arguments, guidance_scale=scale) for scale in (2.0, 3.0))
    assert_close_fp32(triple - double, double - conditional, tolerance=1e-3)
    assert (double - conditional).norm() > 1e-3


def test_timestep_scale_is_applied(upstream):
    ours = tiny.pipeline(diffusers_sana, timestep_scale=0.001)
    theirs = tiny.pipeline(diffusers, timestep_scale=0.001)
    assert_close_fp32(generate(ours), generate(theirs), tolerance=1e-5)
    assert not torch.allclose(generate(ours), generate(upstream))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, ours):
    pipe = diffusers_sana.SanaPipeline(**tiny.components(diffusers_sana))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.to(dtype)
    pipe.vae.to(torch.bfloat16)
    pipe.text_encoder.to(torch.bfloat16)
    latents = generate(pipe)
    assert latents.dtype == torch.float32
    assert_close_fp32(latents, generate(ours), tolerance=0.1)
    assert generate(pipe, output_type="pt").isfinite().all()


def test_other_schedulers(upstream, ours):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    outputs = []
    for pipe, library in ((upstream, diffusers), (ours, diffusers_sana)):
        other = library.SanaPipeline(**pipe.components | {"scheduler": scheduler})
        other.set_progress_bar_config(disable=True)
        outputs.append(generate(other))
    assert_close_fp32(outputs[1], outputs[0])
