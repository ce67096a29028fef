"""Files of `diffusers-sana generate`: names, what is there already, full disks, interruption. Nothing is loaded."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffusers_sana.arguments import UsageError
from diffusers_sana.cli.output import name_files, slug
from tests.cli.commands import run


class Pipe:
    """In place of a pipeline: an image of one color, which is the seed."""

    device = torch.device("cpu")
    transformer = SimpleNamespace(dtype=torch.float32)

    def __init__(self) -> None:
        self.prompts = []

    def __call__(self, prompt, generator, **_):
        self.prompts.append(prompt)
        return ([Image.new("RGB", (32, 32), (generator.initial_seed(), 0, 0))],)


@pytest.fixture
def pipe(monkeypatch, tmp_path):
    pipe = Pipe()
    monkeypatch.setattr("diffusers_sana.cli.generate.load", lambda *_: pipe)
    monkeypatch.chdir(tmp_path)
    return pipe


def names(tasks) -> list[str]:
    return [task.path.name for task in tasks]


def test_names(tmp_path):
    prompts = ["a fox", "A  fox!"]
    assert names(name_files(tmp_path, prompts[:1], [7], False)) == ["a-fox-seed7.png"]
    assert names(name_files(tmp_path, prompts, [1, 2], False)) == [
        "1-a-fox-seed1.png",
        "1-a-fox-seed2.png",
        "2-a-fox-seed1.png",
        "2-a-fox-seed2.png",
    ]
    assert names(name_files(tmp_path / "fox.jpg", prompts[:1], [5], False)) == ["fox.jpg"]
    assert names(name_files(tmp_path / "fox.jpg", prompts[:1], [5, 6], False)) == ["fox-seed5.jpg", "fox-seed6.jpg"]
    (tmp_path / "v1.5").mkdir()
    assert names(name_files(tmp_path / "v1.5", prompts[:1], [-1], False)) == ["a-fox-seed-1.png"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("🦊", "image"),
        ("una raposa açúcar", "una-raposa-açúcar"),
        ("狐 " * 99, None),
    ],
)
def test_slugs(prompt, name, tmp_path):
    assert name is None or slug(prompt) == name
    (task,) = name_files(tmp_path, [prompt], [-(2**63)], False)
    task.path.touch()  # a name that the file system takes


def test_files_that_are_there(pipe, tmp_path):
    """In a folder the next name is free; a file is replaced where it is asked for."""
    for name in ("a-fox-seed0.png", "a-fox-seed0-2.png", "a-fox-seed0-3.png"):
        assert run("generate", "a fox", "--out", "new").out == f"{tmp_path / 'new' / name}\n"
    (tmp_path / "fox-seed8.png").touch()
    ended = run("generate", "a fox", "--seed", "7", "--num-images", "2", "--out", "fox.png")
    assert "--out must be new, but fox-seed8.png is there already; pass --overwrite" in ended.error
    assert not (tmp_path / "fox-seed7.png").exists()
    run("generate", "a fox", "--seed", "7", "--num-images", "2", "--out", "fox.png", "--overwrite")
    assert Image.open("fox-seed8.png").getpixel((0, 0)) == (8, 0, 0)


def test_formats(pipe):
    for suffix in ("png", "jpg", "webp", "tiff", "bmp", "gif"):
        assert run("generate", "a fox", "--out", f"fox.{suffix}").code == 0
        assert Image.open(f"fox.{suffix}").size == (32, 32)


def test_a_file_of_prompts(pipe, tmp_path):
    Path("prompts.txt").write_text("\ufeffa fox\r\n\n  a cat \n", encoding="utf-8")
    ended = run("generate", "--prompts", "prompts.txt", "--out", "new")
    assert pipe.prompts == ["a fox", "a cat"]
    assert [Path(line).name for line in ended.out.splitlines()] == ["1-a-fox-seed0.png", "2-a-cat-seed0.png"]


def test_a_full_disk(pipe, tmp_path, monkeypatch):
    def save(image, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    ended = run("generate", "a fox", "--out", "fox.png")
    assert ended.error == "diffusers-sana generate: fox.png cannot be written: No space left on device\n"
    assert ended.code == 1
    assert list(tmp_path.iterdir()) == []


def test_interruption(pipe, tmp_path, monkeypatch):
    """What is finished stays, and nothing is half written."""
    save = Image.Image.save

    def interrupted(image, path, **options):
        save(image, path, **options)
        if image.getpixel((0, 0))[0] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    ended = run("generate", "a fox", "--num-images", "3", "--out", "new")
    assert (ended.code, ended.error) == (130, "diffusers-sana generate: interrupted\n")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a-fox-seed0.png"]


def test_out_of_memory(pipe, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("diffusers_sana.cli.generate.load", fail)
    ended = run("generate", "a fox")
    assert ended.code == 1
    assert ended.error.startswith("diffusers-sana generate: out of memory: CUDA out of memory. Tried to allocate 2.00")
    assert len(ended.error.splitlines()) == 1


def test_bugs_keep_their_traceback(pipe, monkeypatch):
    monkeypatch.setattr("diffusers_sana.cli.generate.load", lambda *_: None)
    with pytest.raises(TypeError):
        run("generate", "a fox")
    monkeypatch.setenv("DIFFUSERS_SANA_TRACEBACK", "1")
    with pytest.raises(UsageError):
        run("generate", "")
