"""`SanaVideoPipeline` makes what diffusers' pipeline makes, and where that one is wrong, what is right."""

import inspect
import json
import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.sana_video.pipeline_sana_video import ASPECT_RATIO_480_BIN, ASPECT_RATIO_720_BIN

import diffusers_sana
from diffusers_sana.pipelines.pipeline_sana_video_base import VIDEO_INSTRUCTION
from tests import tiny, tiny_video
from tests.numerics import assert_close_fp32, relative_error
from tests.tiny_video import generate


CAT, DOG = "A cat, sleeping", "a dog that has eaten too much"


@pytest.fixture(scope="module")
def ours():
    return tiny_video.pipeline(diffusers_sana)


@pytest.fixture(scope="module")
def upstream():
    return tiny_video.pipeline(diffusers)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"complex_human_instruction": ["Imagine:", ""], "negative_prompt": "ugly"},
        {"prompt": [CAT, DOG], "frames": 1, "height": 64},
        {"guidance_scale": 1.0, "frames": 9},
        {"num_videos_per_prompt": 2},
        {"output_type": "pt"},
        {"output_type": "np", "frames": 1},
    ],
    ids=str,
)
def test_equals_diffusers(ours, upstream, kwargs):
    actual, expected = (torch.as_tensor(generate(pipe, **kwargs)) for pipe in (ours, upstream))
    assert actual.shape == expected.shape
    assert_close_fp32(actual, expected, tolerance=1e-5)


def test_signature_is_that_of_diffusers_and_more():
    for name, more in (
        ("SanaVideoPipeline", {"motion_score", "guider"}),
        ("SanaImageToVideoPipeline", {"motion_score", "image_fit", "guider"}),
    ):
        ours, theirs = (
            inspect.signature(getattr(library, name).__call__).parameters for library in (diffusers_sana, diffusers)
        )
        assert list(ours)[: len(theirs)] == list(theirs)
        assert set(ours) - set(theirs) == more
        defaults = {key: p.default for key, p in theirs.items() if isinstance(p.default, int | float | str)}
        native = {"height": 480, "width": 832, "frames": 81}  # None for ours: that of the checkpoint
        assert {key: ours[key].default for key in defaults.keys() - native.keys()} == {
            key: value for key, value in defaults.items() if key not in native
        }
        assert {key: defaults[key] for key in native} == native
    assert list(VIDEO_INSTRUCTION) == theirs["complex_human_instruction"].default


def test_pil_frames(ours):
    (frames,) = generate(ours, output_type="pil", use_resolution_binning=True)
    assert len(frames) == 5
    assert {frame.size for frame in frames} == {(32, 32)}
    array = generate(ours, output_type="np")[0]
    assert np.abs(np.asarray(frames[1]) / 255 - array[1]).max() < 0.6 / 255


def test_videos_of_a_batch_equal_single_videos(ours):
    """diffusers repeats masks in another order than features."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    batch = generate(ours, [CAT, DOG], negative_prompt=["x", "yy"], num_videos_per_prompt=2, generator=generators)
    for index, (prompt, negative) in enumerate([(CAT, "x"), (CAT, "x"), (DOG, "yy"), (DOG, "yy")]):
        assert_close_fp32(batch[index : index + 1], generate(ours, prompt, seed=index, negative_prompt=negative))


def test_every_trained_size_is_accepted(ours, upstream):
    """diffusers wants multiples of 32, which 7 of its 11 sizes for 480p are not."""
    refused = 0
    for height, width in ASPECT_RATIO_480_BIN.values():
        ours.check_inputs("a cat", int(height), int(width))
        try:
            upstream.check_inputs("a cat", int(height), int(width))
        except ValueError:
            refused += 1
    assert refused == 7


@pytest.mark.parametrize(
    ("sample_size", "asked", "requested", "generated"),
    [
        (30, {}, (480, 832), (480, 832)),
        (30, {"height": 600, "width": 600}, (600, 600), (624, 624)),
        (22, {}, (704, 1280), (704, 1280)),
        (22, {"height": 480}, (480, 1280), (672, 1344)),
        (2, {}, (32, 32), (32, 32)),
        (30, {"height": 64, "width": 96, "use_resolution_binning": False}, (64, 96), (64, 96)),
        (30, {"latents": torch.zeros(1, 16, 3, 4, 6)}, (32, 48), (32, 48)),
    ],
    ids=str,
)
def test_sizes(ours, monkeypatch, sample_size, asked, requested, generated):
    """diffusers' default is 480 x 832 for every checkpoint; that of 720p is generated larger and shrunk."""
    seen = {}

    def stop(request, size):
        seen.update(size=size, requested=ours._sizes(request)[0], frames=request.frames)
        raise StopIteration

    monkeypatch.setattr(ours, "_check", stop)
    monkeypatch.setattr(
        ours.transformer, "_internal_dict", FrozenDict({**ours.transformer.config, "sample_size": sample_size})
    )
    with pytest.raises(StopIteration):
        ours("a cat", **asked)
    assert (seen["requested"], seen["size"]) == (requested, generated)
    assert seen["frames"] == (9 if "latents" in asked else 81)
    assert len(ASPECT_RATIO_720_BIN) == 11


def test_latents_stay_as_they_are(ours):
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    before = noise.clone()
    out = generate(ours, latents=noise, frames=None, height=None, width=None, generator=None)
    assert torch.equal(noise, before)
    assert torch.equal(out, generate(ours))


def test_motion_score(ours):
    assert torch.equal(generate(ours, CAT, motion_score=30), generate(ours, CAT + " motion score: 30."))
    both = generate(ours, [CAT, DOG], motion_score=0)
    assert torch.equal(both, generate(ours, [CAT + " motion score: 0.", DOG + " motion score: 0."]))
    embeds = {"prompt_embeds": torch.zeros(1, 3, 16), "prompt_attention_mask": torch.ones(1, 3)}
    with pytest.raises(ValueError, match="`motion_score`"):
        generate(ours, None, motion_score=3, **embeds)


def test_flow_shift_survives_another_scheduler(ours, caplog):
    """`from_config` drops it, since diffusers' Euler scheduler names it `shift`."""
    config = tiny_video.scheduler(diffusers).config
    lost = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    right = diffusers.FlowMatchEulerDiscreteScheduler(shift=tiny_video.FLOW_SHIFT)
    chosen = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, shift=2.0)
    assert lost.config.shift == 1.0
    outputs = []
    for scheduler in (lost, right, chosen):
        pipe = diffusers_sana.SanaVideoPipeline(**ours.components | {"scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        outputs.append(generate(pipe))
        assert pipe.scheduler is scheduler
    assert torch.equal(outputs[0], outputs[1])
    assert relative_error(outputs[2], outputs[1]) > 1e-3
    assert lost.config.shift == 1.0  # the user's own is not changed


def test_folders_of_diffusers(tmp_path, upstream):
    upstream.save_pretrained(tmp_path / "theirs")
    expected = generate(upstream)
    for cls in (diffusers_sana.SanaVideoPipeline, diffusers.DiffusionPipeline):
        pipe = cls.from_pretrained(tmp_path / "theirs")
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe) is diffusers_sana.SanaVideoPipeline
        assert_close_fp32(generate(pipe), expected)
        assert type(pipe.transformer) is diffusers_sana.SanaVideoTransformer3DModel
        assert type(pipe.scheduler) is diffusers_sana.FlowDPMSolverScheduler
    assert pipe.scheduler.config.flow_shift == tiny_video.FLOW_SHIFT
    pipe.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SanaVideoTransformer3DModel"]
    assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
    again = diffusers.SanaVideoPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    assert_close_fp32(generate(again), expected)


def test_ltx_autoencoder_equals_diffusers():
    ours, upstream = (
        tiny_video.pipeline(library, parts={"vae": tiny_video.ltx_vae()}) for library in (diffusers_sana, diffusers)
    )
    actual, expected = (generate(pipe, output_type="pt") for pipe in (ours, upstream))
    assert actual.shape == (1, 5, 3, 32, 32)
    assert_close_fp32(actual, expected)


def test_autoencoder_of_images():
    """DC-AE has each frame alone; diffusers' pipeline cannot be made with it."""
    with pytest.raises(AttributeError):
        tiny_video.pipeline(diffusers, parts={"vae": tiny.vae(diffusers)}, in_channels=4, out_channels=4)
    vae = tiny.vae(diffusers_sana)
    pipe = tiny_video.pipeline(diffusers_sana, parts={"vae": vae}, in_channels=4, out_channels=4)
    latents = generate(pipe, frames=3, height=8, width=8)
    assert latents.shape == (1, 4, 3, 4, 4)
    frames = generate(pipe, frames=3, height=8, width=8, output_type="pt")
    with torch.no_grad():
        alone = vae.decode(latents[:, :, 1] / vae.config.scaling_factor).sample
    assert_close_fp32(frames[:, 1], (alone / 2 + 0.5).clamp(0, 1))


def test_decodes_in_tiles_when_out_of_memory(ours, caplog):
    """diffusers warns, and then reads a variable that does not exist."""
    vae, decode, seen = ours.vae, ours.vae.decode, []

    def fail_once(*args, **kwargs):
        seen.append((vae.use_tiling, vae.use_slicing))
        if len(seen) == 1:
            raise torch.OutOfMemoryError("no memory")
        return decode(*args, **kwargs)

    vae.decode = fail_once
    try:
        with caplog.at_level(logging.WARNING, "diffusers_sana"):
            frames = generate(ours, output_type="pt")
    finally:
        del vae.decode
    assert seen == [(False, False), (True, True)]
    assert (vae.use_tiling, vae.use_slicing) == (False, False)
    assert_close_fp32(frames, generate(ours, output_type="pt"))


def test_adapters_of_the_temporal_convolution(ours):
    pipe = tiny_video.pipeline(diffusers_sana)
    torch.manual_seed(1)
    names = ("transformer_blocks.0.ff.conv_temp", "transformer_blocks.1.attn1.to_q")
    shapes = {names[0]: ((2, 24, 3, 1), (24, 2, 1, 1)), names[1]: ((2, 24), (24, 2))}
    lora = {
        f"transformer.{name}.lora_{factor}.weight": torch.randn(shape)
        for name in names
        for factor, shape in zip("AB", shapes[name], strict=True)
    }
    pipe.load_lora_weights(lora)
    changed = generate(pipe)
    assert relative_error(changed, generate(ours)) > 1e-3
    assert_close_fp32(generate(pipe, attention_kwargs={"scale": 0.0}), generate(ours))
    pipe.unload_lora_weights()
    assert_close_fp32(generate(pipe), generate(ours))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"frames": 10}, ValueError, "`frames` must be one more than a multiple of 4.*Use 9 or 13"),
        ({"frames": 0}, ValueError, "`frames` must be at least 1"),
        ({"frames": 5.0}, TypeError, "`frames` must be an integer"),
        ({"height": 40}, ValueError, "`height` must be a multiple of 16, got 40. Use 32 or 48"),
        ({"num_videos_per_prompt": 0}, ValueError, "`num_videos_per_prompt`"),
        ({"latents": torch.zeros(1, 16, 4, 4)}, ValueError, "`latents` must be finite and .videos"),
        ({"latents": torch.zeros(1, 16, 3, 4, 4)}, ValueError, "`latents` must have the shape .1, 16, 2, 4, 4."),
        ({"output_type": "mp4"}, ValueError, "`output_type`"),
        ({"frames": 81 * 4}, ValueError, "`frames`"),
        ({"frames": 65 * 4 + 1}, ValueError, "rope_max_seq_len"),
        ({"motion_score": 1.5}, TypeError, "`motion_score` must be an integer"),
    ],
    ids=str,
)
def test_wrong_arguments(ours, kwargs, error, message):
    with pytest.raises(error, match=message):
        generate(ours, **kwargs)


def test_frames_of_patches():
    pipe = tiny_video.pipeline(diffusers_sana, patch_size=(2, 2, 2))
    assert generate(pipe, frames=5).shape == (1, 16, 2, 4, 4)
    with pytest.raises(ValueError, match=r"divisible by 2.*Use 13"):
        generate(pipe, frames=9)


def test_without_an_autoencoder():
    pipe = tiny_video.pipeline(diffusers_sana, parts={"vae": None})
    assert generate(pipe).shape == (1, 16, 2, 4, 4)
    with pytest.raises(ValueError, match="without an autoencoder"):
        generate(pipe, output_type="np")


def test_progress_and_callback(ours):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(tuple(tensors["latents"].shape))
        return {}

    generate(ours, callback_on_step_end=callback)
    assert steps == [(1, 16, 2, 4, 4)] * 2
    assert ours.num_timesteps == 2
