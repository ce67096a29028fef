"""`diffusers-sana again`: an image from its own file."""

import json

import pytest
from PIL import Image

from diffusers_sana.cli.record import LoRA
from tests.cli.commands import run


@pytest.fixture
def made(tmp_path, monkeypatch):
    """An image that was made of an image, a mask and a LoRA; the name of its file."""
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").resize((96, 128)).save("cat.png")
    Image.linear_gradient("L").resize((96, 128)).save("mask.png")
    inputs = ["--image", "cat.png", "--mask", "mask.png", "--lora", "sana-emoji-pixel-art:0.3", "--strength", "0.6"]
    prompt = '--a "fox", é, on a\ngreen background, 狐'
    options = ["--guidance-scale", "-1.5", "--negative-prompt", "a dog", "--steps", "3", "--seed", "-7"]
    ended = run("generate", *inputs, *options, "--out", "made.png", "--", prompt)
    assert ended.code == 0, ended.error
    return "made.png"


def test_the_same_image(made, tmp_path, caplog):
    ended = run("again", made, "--out", "again.png")
    assert ended.code == 0, ended.error
    assert ended.out == f"{tmp_path / 'again.png'}\n"
    first, second = Image.open(made), Image.open("again.png")
    assert first.tobytes() == second.tobytes()
    assert "differ" not in caplog.text
    one, other = (json.loads(image.info["diffusers_sana"]) for image in (first, second))
    assert one == other
    assert str(tmp_path) not in json.dumps(one)  # what is shared does not name the user's folders

    Image.new("L", (96, 128), 255).save("mask.png")
    ended = run("again", made, "--out", "other.png")
    assert ended.code == 2
    assert "IMAGE was made from other files than are here now: `--mask`" in ended.error
    assert not (tmp_path / "other.png").exists()


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("style.safetensors", LoRA("style.safetensors", 1.0)),
        ("style.safetensors:0.8", LoRA("style.safetensors", 0.8)),
        ("style.safetensors:-1", LoRA("style.safetensors", -1.0)),
        (r"C:\styles\one.safetensors", LoRA(r"C:\styles\one.safetensors", 1.0)),
        ("owner/name:1e-1", LoRA("owner/name", 0.1)),
    ],
)
def test_loras_with_scales(text, lora):
    assert LoRA.parse(text) == lora
    assert LoRA.parse(str(lora)) == lora
