"""Emoji that move: the clips, the rule that judges motions, and the example at tiny size."""

import io
import json
import zipfile
from collections import Counter

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from diffusers_sana import AutoencoderDC, SanaPipeline
from examples.train_emoji.scenes import STYLES, Art
from examples.train_moving_emoji import motions, run
from examples.train_moving_emoji.motions import (
    BACKGROUNDS,
    MOTIONS,
    NUM_HELD_OUT,
    OBJECTS,
    RESOLUTION,
    Clip,
    all_clips,
    held_out_clips,
    path,
    render,
    taught_clips,
)
from examples.train_moving_emoji.rule import measure, motion_of
from tests.numerics import assert_close_fp32
from tests.training.tiny import read_log, tiny_pipeline


FILLS = ("red", "brown", "black", "navy", "maroon", "crimson", "teal", "indigo")
REVERSED = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow"}


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """A pack like that of prepare_data: balloons with a string and a spot, which look the same in no two turns."""
    place = tmp_path_factory.mktemp("emoji") / "emoji-256.zip"
    with zipfile.ZipFile(place, "w") as out:
        out.writestr("metadata.json", json.dumps([{"object": word} for word in OBJECTS]))
        for number, word in enumerate(OBJECTS):
            image = Image.new("RGBA", (256, 256))
            draw = ImageDraw.Draw(image)
            draw.ellipse((56, 16, 200, 150), fill=FILLS[number])
            draw.rectangle((118, 140, 138, 250), fill=FILLS[number])
            draw.ellipse((80, 40, 110, 70 + number), fill="orange")
            file = io.BytesIO()
            image.save(file, "webp", lossless=True)
            for style in STYLES:
                out.writestr(f"{style}/{word}.webp", file.getvalue())
    return place


@pytest.fixture(scope="module")
def art(pack):
    return Art(pack)


def test_clips():
    held_out, taught = held_out_clips(), taught_clips()
    assert len(held_out) == len(set(held_out)) == NUM_HELD_OUT
    assert set(held_out) | set(taught) == set(all_clips())
    assert not set(held_out) & set(taught)
    assert set(Counter(clip.motion for clip in held_out).values()) == {6, 7}
    for parts in ("word", "motion"), ("word", "color"), ("motion", "color"):  # held out are only all three together
        pairs = {tuple(getattr(clip, part) for part in parts) for clip in taught}
        assert pairs == {tuple(getattr(clip, part) for part in parts) for clip in all_clips()}
    prompts = [caption for clip in all_clips() for caption in clip.captions]
    assert len(set(prompts)) == len(prompts) == 2 * len(OBJECTS) * len(MOTIONS) * len(BACKGROUNDS)
    assert Clip("fox", "left", "green").prompt == "a fox slides to the left on a green background"


def test_renders_follow_their_path(art):
    """The object's box, in a frame without others, against the corners that the path says."""
    [video] = render(art, [Clip("cat", "down", "white")])
    assert video.shape == (3, 8, RESOLUTION, RESOLUTION)
    x, y, side, _, _ = path("down")[7].tolist()
    seen = (video[:, 7] - video[:, 7, :1, :1]).abs().sum(0) > 0.5
    rows = seen.any(1).nonzero().flatten()
    middle = RESOLUTION / 2
    expected = [middle + RESOLUTION * (y + side * (edge / 256 - 0.5)) for edge in (16, 250)]
    assert [rows[0].item(), rows[-1].item()] == pytest.approx(expected, abs=2)
    assert x == 0
    appears = render(art, [Clip("cat", "appear", "white")])[0]
    assert (appears[:, 0] == appears[:, 0, :1, :1]).all()
    assert_close_fp32(appears[:, 7], render(art, [Clip("cat", "spin", "white")])[0][:, 0])


def test_the_rule_knows_true_renders(art):
    """Of each object and motion, one background."""
    clips = [clip for number, clip in enumerate(all_clips()) if number % 5 == number // 5 % 5]
    assert len(clips) == len(OBJECTS) * len(MOTIONS)
    assert [(clip, motion_of(video)) for clip, video in zip(clips, render(art, clips), strict=True)] == [
        (clip, clip.motion) for clip in clips
    ]


def test_the_rule_knows_blurred_and_noisy_ones(art):
    """As an autoencoder leaves them."""
    clips, generator = all_clips()[:: len(BACKGROUNDS)], torch.Generator().manual_seed(0)
    videos = torch.nn.functional.avg_pool3d(render(art, clips), (1, 5, 5), 1, (0, 2, 2), count_include_pad=False)
    videos += 0.03 * torch.randn(videos.shape, generator=generator)
    right = [motion_of(video) == clip.motion for clip, video in zip(clips, videos, strict=True)]
    assert sum(right) >= len(clips) - 1


def test_the_rule_knows_what_is_none(art):
    clips = [clip for clip in all_clips() if (clip.word, clip.color) == ("fox", "green")]
    videos = render(art, clips)
    for clip, video in zip(clips, videos, strict=True):
        assert motion_of(video.flip(1)) == REVERSED.get(clip.motion, "")  # turns to the left are none
        assert motion_of(video[:, -1:].expand(-1, 8, -1, -1)) == ""
        order = torch.tensor([4, 7, 1, 3, 0, 6, 2, 5])
        assert motion_of(video[:, order]) == ""
    assert motion_of(torch.zeros(3, 8, 64, 64)) == ""
    assert motion_of(torch.randn(3, 8, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)) == ""


def test_turns_are_measured(art):
    turns = measure(render(art, [Clip("rocket", "spin", "blue")])[0]).turns
    assert turns.tolist() == pytest.approx([1 / 8] * 7, abs=1 / 60)


@pytest.fixture
def small(monkeypatch):
    """Few clips, and few steps of the sampler."""
    monkeypatch.setattr(motions, "OBJECTS", ("fox",))
    monkeypatch.setattr(motions, "BACKGROUNDS", ("green", "blue"))
    monkeypatch.setattr(motions, "NUM_HELD_OUT", 4)
    monkeypatch.setattr(run, "STEPS", 1)
    monkeypatch.setattr(run, "BATCH_SIZE", 2)


def tiny_model(folder):
    """A pipeline of images whose autoencoder makes a cell of 32 x 32 pixels."""
    blocks = ("ResBlock",) * 6
    vae = AutoencoderDC(
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        latent_channels=4,
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
    )
    SanaPipeline(**tiny_pipeline().components | {"vae": vae}).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("small")
def test_trained_resumed_and_judged(tmp_path, pack, art, monkeypatch):
    model, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    monkeypatch.setitem(run.SETTINGS, "max_steps", 2)
    parts = SanaPipeline.from_pretrained(model).components
    run.train_for(60, art, parts, out)
    monkeypatch.setitem(run.SETTINGS, "max_steps", 3)
    run.main(["--data", str(pack), "--model", str(model), "--out", str(out), "--minutes", "60"])
    assert [row["step"] for row in read_log(out / "run")][-1] == 3
    weights = load_file(out / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    report = json.loads((out / "evaluation.json").read_text())
    assert report["generated"]["videos"] == 4
    assert report["true renders"] == {"right": 16, "videos": 16, "wrong": []}
    assert report["parameters"] == sum(value.numel() for value in weights.values())
    with Image.open(out / "held_out.webp") as animation:
        assert animation.n_frames == 8
        assert animation.size == (8 * RESOLUTION, RESOLUTION)
