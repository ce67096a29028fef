"""Clips of videos, animations and images as a dataset."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sana.files import IMAGE_SUFFIXES
from diffusers_sana.training.config import ImageDataOptions
from diffusers_sana.training.data.images import Images
from diffusers_sana.training.data.sources import FolderSource, find_source
from diffusers_sana.training.data.videos import SUFFIXES, VideoInfo, Videos, cut, read_frames, video_info


def write_animation(path, count, size=(24, 16), duration=125):
    """Frames of one color each: red 10, 20, 30, ..."""
    frames = [Image.new("RGB", size, (10 * (index + 1), 0, 0)) for index in range(count)]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, **options)


def reds(pixels):
    """The red of each frame of `[3, F, H, W]`."""
    return ((pixels[0].mean((1, 2)) + 1) * 127.5).round().int().tolist()


@pytest.fixture
def folder(tmp_path):
    write_animation(tmp_path / "long.webp", 12)
    write_animation(tmp_path / "short.gif", 3, size=(16, 32))
    Image.new("RGB", (16, 16), (0, 200, 0)).save(tmp_path / "still.png")
    rows = [{"file_name": name, "text": f"a {name.split('.')[0]}"} for name in ("long.webp", "short.gif", "still.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return FolderSource(tmp_path, suffixes=SUFFIXES)


@pytest.mark.parametrize(
    ("frames", "stored", "lengths", "fps", "clips", "expected"),
    [
        (9, 8.0, [5], 0.0, 1, [(2, 3, 4, 5, 6)]),  # from the middle
        (9, 8.0, [5, 9], 8.0, 1, [tuple(range(9))]),  # the largest that there is
        (8, 8.0, [5, 9], 8.0, 1, [(1, 2, 3, 4, 5)]),
        (9, 16.0, [5], 8.0, 1, [(0, 2, 4, 6, 8)]),
        (5, 8.0, [5, 9], 16.0, 1, [(0, 0, 1, 2, 2, 2, 3, 4, 4)]),  # nearest, halves to even
        (12, 8.0, [5], 8.0, 3, [(0, 1, 2, 3, 4), (7, 8, 9, 10, 11)]),  # two fit
        (4, 8.0, [5], 8.0, 1, []),
        (4, 8.0, [5, 1], 8.0, 2, [(0,), (3,)]),
    ],
)
def test_cut(frames, stored, lengths, fps, clips, expected):
    assert cut(VideoInfo(frames, 8, 8, stored), lengths, fps, clips) == expected


def test_items(folder, caplog):
    videos = Videos(folder, [(16, 32), (16, 16)], lengths=[5], fps=8.0, clips=2)
    assert videos.sizes_of_items == [(5, 16, 32), (5, 16, 32), (1, 16, 16)]
    assert videos.captions == ["a long", "a long", "a still"]
    assert "1 videos are left out, because they have fewer than 5 frames at 8 per second" in caplog.text
    first, second, still = (videos[index] for index in range(3))
    assert first["pixel_values"].shape == (3, 5, 16, 32)
    assert reds(first["pixel_values"]) == [10, 20, 30, 40, 50]
    assert reds(second["pixel_values"]) == [80, 90, 100, 110, 120]
    assert still["pixel_values"].shape == (3, 1, 16, 16)
    assert still["text"] == "a still"
    assert len({json.dumps(videos.made_from(index)) for index in range(3)}) == 3


def test_further_images(folder, tmp_path):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (32, 16), (50, 0, 0)).save(tmp_path / "more" / "one.png")
    (tmp_path / "more" / "one.txt").write_text("one more")
    sizes = [(16, 32), (16, 16)]
    images = Images(find_source(ImageDataOptions(data=str(tmp_path / "more"))), sizes)
    videos = Videos(folder, sizes, lengths=[3], fps=0.0, images=images)
    assert videos.sizes_of_items == [(3, 16, 32), (3, 16, 16), (1, 16, 16), (1, 16, 32)]
    item = videos[3]
    assert item["pixel_values"].shape == (3, 1, 16, 32)
    assert item["text"] == videos.captions[3] == "one more"
    assert videos.made_from(3) == images.made_from(0)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_animations(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_animation(path, 5, duration=40)
    assert video_info(path) == VideoInfo(5, 16, 24, pytest.approx(25))
    frames = read_frames(path, [0, 2, 2, 4])
    assert [frame.mode for frame in frames] == ["RGB"] * 4
    assert [np.asarray(frame)[0, 0, 0] for frame in frames] == [10, 30, 30, 50]
    with pytest.raises(ValueError, match=r"a\.\w+' cannot be read as a video: frame 7 is not there"):
        read_frames(path, [3, 7])


def test_other_videos_are_read_by_ffmpeg(tmp_path, monkeypatch):
    """The calls are those of imageio-ffmpeg, here of a stand-in that decodes nothing."""
    path = tmp_path / "a.MP4"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r"a\.MP4' is read by FFmpeg: pip install 'diffusers_sana\[video\]'"):
        video_info(path)

    def read(name):
        assert name == str(path)
        yield {"size": (4, 2), "fps": 24.0}
        yield from (bytes([value] * 24) for value in (1, 2, 3))

    reader = types.SimpleNamespace(read_frames=read, count_frames_and_secs=lambda name: (3, 0.125))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", reader)
    assert video_info(path) == VideoInfo(3, 2, 4, 24.0)
    assert [np.asarray(frame).tolist() for frame in read_frames(path, [1])] == [[[[2] * 3] * 4] * 2]

    def fail(name):
        raise OSError("no such codec")

    monkeypatch.setattr(reader, "count_frames_and_secs", fail)
    with pytest.raises(ValueError, match=r"a\.MP4' cannot be read as a video: no such codec"):
        video_info(path)


def test_nothing_to_train_on(tmp_path):
    write_animation(tmp_path / "a.gif", 3)
    source = FolderSource(tmp_path, suffixes=SUFFIXES, captions="optional")
    with pytest.raises(ValueError, match="`data` must have videos of 9 frames or more, got none"):
        Videos(source, [(16, 16)], lengths=[9])
    assert len(FolderSource(tmp_path, captions="optional", suffixes=IMAGE_SUFFIXES).paths) == 1
    pixels = Videos(source, [(16, 16)], lengths=[3], fps=0)[0]["pixel_values"]
    assert torch.equal(pixels[1:], -torch.ones(2, 3, 16, 16))
