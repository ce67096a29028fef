"""The emoji example at 256 px: scenes and what is held out of them, and the autoencoder's three phases, tiny."""

import io
import json
import random
import zipfile
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from diffusers_sana import AutoencoderDC
from examples.train_emoji import autoencoder, prepare_data
from examples.train_emoji.models import make_autoencoder_256
from examples.train_emoji.scenes import (
    COLORS,
    GRID,
    HELD_OUT,
    OBJECTS,
    STYLES,
    Art,
    Scene,
    Scenes,
    crop,
    held_out_scenes,
    image_batches,
    is_held_out,
    placement,
    plural,
    render,
    with_article,
)


WORDS = ("cat", "dog", "bread", "key", "red ball", "blue ball", "tomato", "ufo")
WEIGHTS = "diffusion_pytorch_model.safetensors"
FILLS = {"red ball": "red", "blue ball": "blue"}


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """A pack like that of prepare_data: discs of 256 px."""
    images = []
    for word in WORDS:
        image = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(image).ellipse((16, 16, 240, 240), fill=FILLS.get(word, "brown"))
        images.append(image)
    path = tmp_path_factory.mktemp("emoji") / "emoji-256.zip"
    rows = [{"object": word} for word in WORDS]
    prepare_data.write_pack(path, rows, {style: images for style in STYLES}, quality=95)
    return path


@pytest.fixture(scope="module")
def art(pack):
    return Art(pack)


def color_at(image, x, y):
    """Of the pixel, in [0, 255]."""
    return ((image[:, y, x] + 1) * 127.5).round()


def test_the_pack_is_read_as_it_was_written(pack, art):
    with zipfile.ZipFile(pack) as file:
        assert Image.open(io.BytesIO(file.read("flat/cat.webp"))).size == (256, 256)
    assert art.objects == list(WORDS)
    assert {side: tuple(pixels.shape) for side, pixels in art.pixels.items()} == {
        side: (len(WORDS), 2, 4, side, side) for side in (192, 128)
    }


def test_a_pair_stands_left_and_right_and_three_stand_in_a_triangle(art):
    pair = Scene(("red ball", "blue ball"), "3d", "white")
    three = Scene(("red ball",) * 3, "flat", "green")
    at_the_top = Scene(("blue ball",), "flat", "green", "top")
    pair_image, three_image, top_image = render(art, [pair, three, at_the_top])
    red, blue, green = (torch.tensor(rgb) for rgb in ((255, 0, 0), (0, 0, 255), COLORS["green"]))
    assert (color_at(pair_image, 64, 128) - red).abs().max() < 8
    assert (color_at(pair_image, 192, 128) - blue).abs().max() < 8
    assert (color_at(pair_image, 128, 10) - torch.tensor(COLORS["white"])).abs().max() < 1
    for x, y in ((128, 64), (64, 192), (192, 192)):
        assert (color_at(three_image, x, y) - red).abs().max() < 8
    assert (color_at(three_image, 20, 64) - green).abs().max() < 1
    assert (color_at(top_image, 128, 64) - blue).abs().max() < 8
    assert (color_at(top_image, 128, 192) - green).abs().max() < 1


def test_every_object_stands_on_the_token_grid(art):
    source = Scenes(art.objects, seed=1)
    for scene in (source.sample(held_out=None) for _ in range(300)):
        side, corners = placement(scene)
        assert all(value % GRID == 0 for corner in corners for value in corner)
        assert all(0 <= value <= 256 - side for corner in corners for value in corner)


def test_a_crop_is_a_square_of_the_scene_on_the_token_grid_with_an_object(art):
    scenes = [
        Scene(("cat",), "3d", "red"),
        Scene(("cat",), "3d", "red", "left"),
        Scene(("cat", "dog"), "flat", "blue"),
    ]
    images = render(art, scenes)
    rng = random.Random(0)
    for _ in range(20):
        for image, part in zip(images, crop(images, scenes, 128, rng), strict=True):
            places = [(x, y) for x in range(0, 129, GRID) for y in range(0, 129, GRID)]
            assert any(torch.equal(part, image[:, y : y + 128, x : x + 128]) for x, y in places)
            background = image[:, 0, 0, None, None]
            assert ((part - background).abs().amax(0) > 0.1).float().mean() > 0.3


def test_batches_are_reproducible(art):
    first, again = (next(image_batches(art, 3, 128, seed=5))["pixel_values"] for _ in range(2))
    assert first.shape == (3, 3, 128, 128)
    assert torch.equal(first, again)
    assert not torch.equal(first, next(image_batches(art, 3, 128, seed=6))["pixel_values"])


def test_captions_name_what_the_scene_shows():
    pair = Scene(("cat", "dog"), "3d", "orange")
    assert pair.prompt == "a cat on the left and a dog on the right on an orange background, 3d style"
    phrasings = {pair.caption(random.Random(seed)) for seed in range(200)}
    assert "a dog to the right of a cat on an orange background, 3d style" in phrasings
    assert not any("a cat to the right" in phrasing or "a dog to the left" in phrasing for phrasing in phrasings)
    assert Scene(("tomato",) * 2, "flat", "red").prompt == "two tomatoes on a red background, flat style"
    assert Scene(("bread",), "flat", "red", "top").prompt == "bread at the top on a red background, flat style"
    assert Scene(("key",), "3d", "red", small=True).prompt == "a small key on a red background, 3d style"


def test_english():
    assert [with_article(word) for word in ("egg", "ufo", "umbrella", "unicorn", "grapes")] == [
        *("an egg", "a ufo", "an umbrella", "a unicorn", "grapes")
    ]
    assert [plural(word) for word in ("bus", "candy", "monkey", "mouse", "fox", "fish", "apple")] == [
        *("buses", "candies", "monkeys", "mice", "foxes", "fish", "apples")
    ]


def test_training_never_shows_what_is_held_out():
    source = Scenes(list(OBJECTS), seed=2)
    assert not any(is_held_out(source.sample()) for _ in range(3000))
    scene = Scene(("cat", "dog"), "3d", "red")
    assert is_held_out(scene) == is_held_out(replace(scene, objects=("dog", "cat"))), "order tells nothing new"
    single = Scene(("cat",), "flat", "blue")
    assert is_held_out(single) == is_held_out(replace(single, position="left"))


def test_the_held_out_prompts_are_those_that_were_chosen_before_training():
    """The file was written before any training; the rule that made it must not drift."""
    scenes = held_out_scenes(list(OBJECTS))
    chosen = (autoencoder.STATE.parents[1] / "held_out_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert [scene.prompt for scene in scenes] == chosen
    assert len(set(chosen)) == sum(HELD_OUT.values()) == 100
    assert all(is_held_out(scene) for scene in scenes)


def test_the_autoencoder_fits_beside_the_other_parts():
    """The weights of all bundled parts share 18.9 M parameters."""
    with torch.device("meta"):
        model = make_autoencoder_256()
    assert sum(p.numel() for p in model.parameters()) < 8.5e6


def tiny():
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(4, 4, 8, 8, 16, 16),
        decoder_block_out_channels=(4, 4, 8, 8, 16, 16),
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
    )


def test_phases_follow_each_other_and_the_state_outlives_the_run(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "make_autoencoder_256", tiny)
    monkeypatch.setattr(autoencoder, "JUDGED", 2)
    small = {
        number: replace(phase, batch_size={"cpu": 2, "cuda": 2}, settings={**phase.settings, "gan_warmup_steps": 0})
        for number, phase in autoencoder.PHASES.items()
    }
    monkeypatch.setattr(autoencoder, "PHASES", small)
    monkeypatch.setattr(autoencoder, "COMMON", {**autoencoder.COMMON, "max_steps": 2, "scaling_batches": 1})
    state = tmp_path / "state"
    arguments = ["--data", str(pack), "--state", str(state), "--save-state"]
    autoencoder.main([*arguments, "--out", str(tmp_path / "first")])
    progress = json.loads((state / "progress.json").read_text())
    assert (progress["phase"], progress["images"]) == (3, 3 * 2 * 2)
    assert {"psnr_db", "gradient_energy", "latent_rms", "device", "versions"} <= set(progress)
    assert (tmp_path / "first" / "phase_3" / "judged.png").exists()
    assert AutoencoderDC.from_pretrained(state).config.scaling_factor == pytest.approx(1 / progress["latent_rms"])
    kept, trained = (load_file(folder / WEIGHTS) for folder in (state, tmp_path / "first" / "phase_3" / "model"))
    assert kept.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(kept[name], value.to(torch.bfloat16)), name
    # Another folder goes on from the state, and counts on.
    autoencoder.main([*arguments, "--out", str(tmp_path / "second"), "--phase", "3"])
    assert json.loads((state / "progress.json").read_text())["images"] == 4 * 2 * 2
    with pytest.raises(ValueError, match=r"needs .*phase_1"):
        autoencoder.main(["--data", str(pack), "--out", str(tmp_path / "third"), "--phase", "2", "--state", "none"])
