"""LongSANA's pipeline: frames one after the other, with four steps a chunk and in constant memory."""

import json
import logging

import diffusers
import numpy as np
import pytest
import torch

import diffusers_sana
from benchmarks.bench_long_video import RESULT, PeakMemory, peak_of_a_video
from diffusers_sana.pipelines.sampling import sample_by_renoising
from diffusers_sana.pipelines.video_decoding import decode_stream, decode_videos
from tests import tiny, tiny_video
from tests.numerics import assert_close_fp32, relative_error


SIZE = {"height": 16, "width": 16, "use_resolution_binning": False, "complex_human_instruction": None}


@pytest.fixture(scope="module")
def pipe():
    return tiny_video.pipeline(diffusers_sana, "LongSanaVideoPipeline")


def arguments(frames=17, base_chunk_frames=2, seed=3, **changes):
    """Of two chunks, of 3 and 2 latent frames, without `changes`."""
    generator = torch.Generator().manual_seed(seed)
    return SIZE | {"frames": frames, "base_chunk_frames": base_chunk_frames, "generator": generator} | changes


def latents_of(pipe, **changes):
    return pipe(**{"prompt": "a cat"} | arguments(output_type="latent") | changes).frames


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_stream_has_the_frames_of_the_video(pipe, output_type):
    prompts, changes = ["a cat", "a dog"], {"output_type": output_type}
    video = pipe(prompts, **arguments(**changes)).frames
    frames = list(pipe.stream(prompts, **arguments(**changes)))
    assert len(frames) == (5 if output_type == "latent" else 17)
    for index, frame in enumerate(frames):
        if output_type == "pil":
            expected = [images[index] for images in video]
            assert [image.size for image in frame] == [(16, 16)] * 2
            assert all(np.array_equal(*pair) for pair in zip(frame, expected, strict=True))
        else:
            expected = video[:, :, index] if output_type == "latent" else video[:, index]
            assert frame.shape == {"np": (2, 16, 16, 3), "pt": (2, 3, 16, 16), "latent": (2, 16, 2, 2)}[output_type]
            assert np.array_equal(frame, expected)
    (same,) = pipe(prompts, **arguments(**changes), return_dict=False)
    assert len(same) == 2


def test_frames_are_those_of_the_latents(pipe):
    latents = latents_of(pipe)
    frames = pipe("a cat", **arguments(output_type="pt")).frames
    expected = decode_videos(pipe.vae, latents, 8).transpose(1, 2) / 2 + 0.5
    assert_close_fp32(frames, expected.clamp(0, 1))


@pytest.mark.parametrize("make", [tiny_video.vae, lambda: tiny.vae(diffusers_sana)], ids=["wan", "dc_ae"])
@torch.no_grad()
def test_decoding_frame_by_frame_is_decoding_the_video(make):
    vae = make()
    channels = vae.config.get("z_dim") or vae.config.latent_channels
    latents = torch.randn(2, channels, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    scale = 8 if "z_dim" in vae.config else 2 ** (len(vae.config.encoder_block_out_channels) - 1)
    before = {name: value for name, value in vars(vae).items() if not name.startswith("_mod")}
    parts = list(decode_stream(vae, latents.unbind(2), scale))
    assert [part.shape[2] for part in parts] == ([1, 4, 4] if scale == 8 else [1, 1, 1])
    assert_close_fp32(torch.cat(parts, dim=2), decode_videos(vae, latents, scale))
    assert {name: vars(vae)[name] for name in before} == before


def test_each_video_is_as_if_alone(pipe):
    """The authors' code generates one at a time."""

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    both = latents_of(pipe, generator=generators(), num_videos_per_prompt=2)
    for video, generator in zip(both, generators(), strict=True):
        assert_close_fp32(video[None], latents_of(pipe, generator=generator))


def test_work_is_done_when_frames_are_asked_for(pipe, monkeypatch):
    times, forward = [], type(pipe.transformer).forward

    def spy(self, *args, **kwargs):
        times.append(kwargs["timestep"][0].item())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", spy)
    stream = pipe.stream("a cat", **arguments())
    assert times == []
    next(stream)
    assert times == [1000, 960, 889, 727]
    for _ in range(9):  # 1 + 4 + 4 frames are of the first chunk
        next(stream)
    assert times == [1000, 960, 889, 727, 0, 1000, 960, 889, 727]
    assert len(list(stream)) == 7
    assert len(times) == 9  # nothing comes after the last chunk, so it is not added to the state


def test_later_chunks_depend_on_earlier_ones_only(pipe):
    noise = torch.randn(1, 16, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    changed = noise.clone()
    changed[:, :, 3:] += 1
    first, second = (latents_of(pipe, latents=latents, frames=None) for latents in (noise, changed))
    assert torch.equal(first[:, :, :3], second[:, :, :3])
    assert relative_error(first[:, :, 3:], second[:, :, 3:]) > 1e-3
    noise[:, :, :3] += 1
    third = latents_of(pipe, latents=noise, frames=None)
    assert relative_error(first[:, :, 3:], third[:, :, 3:]) > 1e-4  # 1e-7 would be rounding


@torch.no_grad()
def test_prompts_of_chunks(pipe):
    """Against the loop written out; the state of a chunk is made with its own prompt."""
    noise = torch.randn(1, 16, 7, 2, 2, generator=torch.Generator().manual_seed(0))
    state, expected = diffusers_sana.SanaVideoState(), []
    for prompt, chunk in zip(("a cat", "a dog", "a dog"), noise.split([3, 2, 2], dim=2), strict=True):
        embeds, mask, _, _ = pipe.encode_prompt(prompt, False)
        text = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        time = torch.tensor([1000.0])
        expected.append(chunk - pipe.transformer(chunk, timestep=time, **text, state=state).sample)
        state = pipe.transformer(expected[-1], timestep=0 * time, **text, state=state).state
    expected = torch.cat(expected, dim=2)

    asked = []

    def ask(index):
        asked.append(index)
        return "a dog" if index == 1 else None

    same = arguments(latents=noise, frames=None, timesteps=[1000], output_type="latent")
    assert_close_fp32(pipe("a cat", **same, chunk_prompts={1: "a dog"}).frames, expected)
    assert_close_fp32(pipe(**same, chunk_prompts=["a cat", "a dog"]).frames, expected)
    stream = pipe.stream("a cat", **same, chunk_prompts=ask)
    frames = [next(stream) for _ in range(3)]
    assert asked == []  # the second chunk has not begun
    assert_close_fp32(torch.stack([*frames, *stream], dim=2), expected)
    assert asked == [1, 2]
    assert relative_error(pipe("a cat", **same).frames[:, :, 3:], expected[:, :, 3:]) > 1e-3


def test_prompts_of_chunks_are_for_one_or_for_all_videos(pipe):
    same = {"timesteps": [1000], "motion_score": 10}
    noise = torch.randn(2, 16, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    both = latents_of(pipe, prompt=["a cat", "a fox"], latents=noise, frames=None, chunk_prompts={1: "a dog"}, **same)
    for prompt, own, video in zip(("a cat", "a fox"), noise.split(1), both, strict=True):
        alone = latents_of(pipe, prompt=prompt, latents=own, frames=None, chunk_prompts={1: ["a dog"]}, **same)
        assert_close_fp32(video[None], alone)


def test_longer_than_the_model_was_made_for(pipe):
    """Positions go on: as in the same model with a larger limit."""
    longer = tiny_video.pipeline(diffusers_sana, "LongSanaVideoPipeline", rope_max_seq_len=80)
    few = {"frames": 4 * 69 + 1, "base_chunk_frames": 35, "timesteps": [1000]}
    with pytest.raises(ValueError, match=r"`frames` must be at most 253 .*which `max_latent_frames` allows"):
        latents_of(pipe, **few)
    with pytest.raises(ValueError, match=r"`frames` must be at most 273 \(69 latent.*, got 277"):
        latents_of(pipe, **few, max_latent_frames=69)
    made = latents_of(pipe, **few, max_latent_frames=70)
    assert made.shape[2] == 70
    assert torch.equal(made, latents_of(longer, **few))


def test_sampler_is_the_scalar_loop(monkeypatch):
    noises = iter([0.5, -2.0])
    monkeypatch.setattr("diffusers_sana.pipelines.sampling.randn_tensor", lambda *_, **__: torch.tensor(next(noises)))
    seen = []

    def predict(latents, time):
        seen.append((round(latents.item(), 6), time))
        return latents / 2

    result = sample_by_renoising(predict, torch.tensor(1.0), [1000, 600, 200], [1.0, 0.6, 0.2], None)
    # x0 = 1 - 1 / 2; x = 0.4 * 0.5 + 0.6 * 0.5; x0 = 0.5 - 0.6 * 0.25; x = 0.8 * 0.35 - 0.2 * 2
    assert seen == [(1.0, 1000), (0.5, 600), (-0.12, 200)]
    assert result.item() == pytest.approx(-0.12 + 0.2 * 0.06)


def test_chunks(pipe):
    for length, expected in ((21, [11, 10]), (41, [11, 10, 10, 10]), (9, [9]), (10, [10]), (20, [10, 10])):
        assert pipe._cut(length, 10) == expected


def test_memory_does_not_grow_with_the_length():
    """A minute of latents, a quarter of frames, and the minute of the benchmark. A whole video is the control."""
    for output_type, seconds in (("latent", 60), ("pt", 15)):
        short, long = (peak_of_a_video(length, output_type) for length in (5, seconds))
        assert long <= 1.01 * short
    measured = json.loads(RESULT.read_text())["peak_bytes_by_seconds"]
    assert measured.keys() == {"5", "10", "20", "40", "60"}
    assert max(measured.values()) <= 1.01 * measured["5"]
    whole, peaks = tiny_video.pipeline(diffusers_sana), []
    for frames in (81, 241):
        with PeakMemory() as memory:
            tiny_video.generate(whole, frames=frames, num_inference_steps=1)
        peaks.append(memory.peak)
    assert peaks[1] > 1.5 * peaks[0]


def test_folders(pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is diffusers_sana.LongSanaVideoPipeline
    expected = latents_of(pipe)
    assert_close_fp32(latents_of(again), expected)
    # As the authors' folder on the Hub has it, with a class that diffusers lacks.
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text()) | {"_class_name": "SanaVideoPipeline"}
    file.write_text(json.dumps(index | {"transformer": ["diffusers", "SanaVideoCausalTransformer3DModel"]}))
    with caplog.at_level(logging.WARNING):
        again = diffusers_sana.LongSanaVideoPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert_close_fp32(latents_of(again), expected)
        assert "LongSanaVideoPipeline" not in caplog.text
        diffusers_sana.SanaVideoPipeline.from_pretrained(tmp_path)
    assert "Use `LongSanaVideoPipeline.from_pretrained`" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 18}, "`frames` must be one more than a multiple of 4.*got 18. Use 17 or 21"),
        ({"frames": 257}, "`frames` must be at most 253 .*got 257"),
        ({"frames": 0}, "`frames` must be"),
        ({"height": 24}, "`height` must be a multiple of 16"),
        ({"base_chunk_frames": 0}, "`base_chunk_frames` must be at least 1"),
        ({"timesteps": []}, "`timesteps` must descend"),
        ({"timesteps": [500, 900]}, "`timesteps` must descend"),
        ({"timesteps": [1200, 900]}, "at most 1000"),
        ({"timesteps": [900, 500, -1]}, "`timesteps` must descend, be above 0"),
        ({"timesteps": [900, float("nan")]}, "finite"),
        ({"latents": torch.zeros(1, 16, 4, 2, 2)}, r"`latents` must have the shape \[1, 16, 5, 2, 2\]"),
        ({"output_type": "mp4"}, "`output_type` must be one of"),
        ({"generator": [torch.Generator()] * 3}, "`generator` must be one generator or a list of 1"),
        ({"chunk_prompts": ["a cat", "a dog"]}, "`prompt` must be left out where `chunk_prompts` is a list"),
        ({"prompt": None, "chunk_prompts": []}, "`chunk_prompts` must have a prompt for each chunk"),
        ({"prompt": None, "chunk_prompts": ["a", "b", "c"]}, "`chunk_prompts` must be for the 2 chunks"),
        ({"chunk_prompts": {0: "a dog"}}, "`chunk_prompts` must be at least 1"),
        ({"chunk_prompts": {1: ["a dog", "a fox"]}}, "or one for each of the 1 prompts"),
        ({"chunk_prompts": {1: ""}, "max_latent_frames": 0}, "`max_latent_frames` must be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_inputs(pipe, changes, message):
    with pytest.raises(ValueError, match=message):
        next(pipe.stream(**{"prompt": "a cat"} | arguments(**changes)))


def test_errors_come_before_the_first_frame_is_asked_for(pipe):
    with pytest.raises(ValueError, match="`frames`"):
        pipe.stream("a cat", **arguments(frames=18))


def test_wrong_parts():
    parts = {"vae": tiny_video.ltx_vae()}
    pipe = tiny_video.pipeline(diffusers_sana, "LongSanaVideoPipeline", parts)
    with pytest.raises(ValueError, match="`vae` must be AutoencoderKLWan or AutoencoderDC"):
        pipe.stream("a cat", **arguments())
    assert latents_of(pipe).shape[2] == 9
    upstream = {"transformer": tiny_video.transformer(diffusers)}
    with pytest.raises(TypeError, match="`transformer` must be a SanaVideoTransformer3DModel of diffusers_sana"):
        latents_of(tiny_video.pipeline(diffusers_sana, "LongSanaVideoPipeline", upstream))
    without = tiny_video.pipeline(diffusers_sana, "LongSanaVideoPipeline", {"vae": None})
    with pytest.raises(ValueError, match="`output_type` must be 'latent'"):
        without.stream("a cat", **arguments())
