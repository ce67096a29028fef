"""The training of the probe for emoji, on made-up art: it learns, and its questions are about what the image shows."""

import json

import pytest
import torch

from diffusers_sana import AutoencoderDC
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.evaluation.checks import read_checks
from examples.train_emoji import probe as training
from examples.train_emoji.data import EmojiScenes, Scene, is_held_out
from tests.examples.conftest import NAMES, art, pack  # noqa: F401, fixtures


@pytest.fixture
def data(art):  # noqa: F811
    vae = AutoencoderDC.from_pretrained(SANA_EMOJI, subfolder="vae", dtype=torch.float32)
    return training.ProbeScenes(EmojiScenes(art, seed=1, labels=NAMES), vae)


def test_it_learns(data):
    probe = training.train(data, steps=40, batch_size=32, store=64)
    scenes = training.judged_scenes(NAMES)
    singles = [scene for scene in scenes if len(scene.labels) == 1]
    assert all(is_held_out(scene.labels[0], scene.style, scene.color) for scene in singles)
    assert len(singles) * 2 == len(scenes)
    figures = training.judge(probe, data, scenes)
    for shares in figures.values():
        assert shares["background"] > 0.5
        assert shares["count"] > 0.7
    # And a wrong answer is counted as one.
    wrong = [Scene(scene.labels[::-1], scene.style, "black") for scene in scenes if len(scene.labels) == 2]
    true = [Scene(scene.labels, scene.style, "white") for scene in wrong]
    assert training.accuracy(probe, (data.scenes.render(true) + 1) / 2, wrong)["background"] < 0.1


def test_training_never_shows_what_is_held_out(data):
    scenes = [data.sample() for _ in range(1000)]
    singles = [scene for scene in scenes if len(scene.labels) == 1]
    assert not any(is_held_out(scene.labels[0], scene.style, scene.color) for scene in singles)
    assert 0.3 < 1 - len(singles) / len(scenes) < 0.5


def test_checks(tmp_path):
    rows = training.checks([Scene(("cat",), "3d", "red", " at the top"), Scene(("cat", "dog"), "flat", "blue")])
    (tmp_path / "checks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    top, pair = read_checks(tmp_path / "checks.jsonl")
    assert (top.tag, top.include[0].place, top.total, top.background, top.style) == ("position", "top", 1, "red", "3d")
    assert top.prompt == "a cat at the top on a red background, 3d style"
    assert (pair.tag, pair.include[1].position, pair.total, pair.seed) == ("two_object", ("right of", 0), 2, 1)
