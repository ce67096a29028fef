"""`diffusers-sana generate --video`: files of videos, and what they say of how they were made."""

import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import diffusers_sana
from diffusers_sana.cli import video_files
from diffusers_sana.cli.video_files import read_video_record, write_video
from tests import tiny_video
from tests.cli.commands import run


PIPELINES = ("SanaVideoPipeline", "LongSanaVideoPipeline")
SMALL = ["--video", "--frames", "5", "--height", "32", "--width", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SANA-Video and a tiny LongSANA."""
    folder = tmp_path_factory.mktemp("models")
    for name in PIPELINES:
        tiny_video.pipeline(diffusers_sana, name).save_pretrained(folder / name)
    return folder


def frames_of(path):
    """The images of a video, and how long each is shown."""
    with Image.open(path) as video:
        return [(frame.convert("RGB"), frame.info["duration"]) for frame in ImageSequence.Iterator(video)]


def psnr(image, wanted):
    one, other = (np.asarray(x).astype(float) for x in (image, wanted))
    return float(20 * np.log10(255 / np.sqrt(((one - other) ** 2).mean() + 1e-12)))


def test_a_video_and_the_same_again(folder, tmp_path):
    model, out = folder / "SanaVideoPipeline", tmp_path / "cat.webp"
    options = ["--steps", "2", "--fps", "10", "--motion-score", "0", "--seed", "4", "--out", str(out)]
    command = ["generate", "a cat", "--model", str(model), *SMALL, *options]
    ended = run(*command)
    assert ended.code == 0, ended.error
    assert ended.out == f"{out}\n"
    pipe = diffusers_sana.SanaVideoPipeline.from_pretrained(model, dtype=torch.float32)
    few = {"num_inference_steps": 2, "frames": 5, "height": 32, "width": 32, "motion_score": 0}
    wanted = pipe("a cat", **few, generator=torch.Generator().manual_seed(4)).frames[0]
    found = frames_of(out)
    assert [duration for _, duration in found] == [100] * 5
    assert min(psnr(image, other) for (image, _), other in zip(found, wanted, strict=True)) > 25
    record = json.loads(read_video_record(out))
    assert {name: record[name] for name in ("prompt", "seed", "steps")} == {"prompt": "a cat", "seed": 4, "steps": 2}
    assert "--motion-score=0" in record["command"]  # a number that Python takes for False

    assert "cat.webp is there already; pass --overwrite" in run(*command).error
    again = tmp_path / "again.webp"
    ended = run("again", str(out), "--out", str(again), "--device", "cpu")
    assert ended.code == 0, ended.error
    assert again.read_bytes() == out.read_bytes()


def test_a_stream(folder, tmp_path):
    """At 16 frames per second, of which a GIF has hundredths of seconds."""
    out = tmp_path / "cats.gif"
    options = ["--model", str(folder / "LongSanaVideoPipeline"), "--num-images", "2", "--out", str(out)]
    ended = run("generate", "a cat", *SMALL, *options)
    assert ended.code == 0, ended.error
    first, second = (tmp_path / f"cats-seed{seed}.gif" for seed in (0, 1))
    assert ended.out == f"{first}\n{second}\n"
    assert [duration for _, duration in frames_of(first)] == [60, 60, 70, 60, 60]
    assert json.loads(read_video_record(second))["command"][0] == "--seed=1"
    pipe = diffusers_sana.LongSanaVideoPipeline.from_pretrained(folder / "LongSanaVideoPipeline")
    size = {"frames": 5, "height": 32, "width": 32, "generator": torch.Generator().manual_seed(0)}
    wanted = pipe("a cat", **size).frames[0]
    assert min(psnr(image, other) for (image, _), other in zip(frames_of(first), wanted, strict=True)) > 15


def boxes(*named):
    """Boxes of an MP4, the last with a size of 64 bits."""
    *others, (kind, body) = named
    plain = b"".join(struct.pack(">I4s", 8 + len(data), name) + data for name, data in others)
    return plain + struct.pack(">I4sQ", 1, kind, 16 + len(body)) + body


def test_a_box_of_an_mp4_has_the_record(tmp_path, monkeypatch):
    path = tmp_path / "cat.mp4"
    video = boxes((b"ftyp", b"isom"), (b"uuid", bytes(20)), (b"mdat", bytes(100)))

    def write(path, frames, fps):
        assert (list(frames), fps) == (["image"], 16.0)
        path.write_bytes(video)

    monkeypatch.setattr(video_files, "_write_mp4", write)
    write_video(path, iter(["image"]), 16.0, '{"seed": 3}')
    assert path.read_bytes().startswith(video)
    assert read_video_record(path) == '{"seed": 3}'
    for content in (video, video[:40], b"", bytes(64)):
        path.write_bytes(content)
        assert read_video_record(path) is None
    assert "IMAGE must be a video that `diffusers-sana generate` wrote" in run("again", str(path)).error


def test_what_to_install_for_an_mp4(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(video_files, "find_spec", lambda name: None if name == "imageio_ffmpeg" else name)
    for out in (tmp_path / "cat.mp4", tmp_path / "videos"):
        ended = run("generate", "a cat", *SMALL, "--model", str(folder / "SanaVideoPipeline"), "--out", str(out))
        assert ended.code == 1
        assert "a .mp4 needs imageio-ffmpeg, not installed here: pip install 'diffusers_sana[video]'" in ended.error
        assert not out.exists()
