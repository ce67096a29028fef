"""The probe's answers as objects with places, saving, and the bundled one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_sana import SanaPipeline, checkpoints
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.evaluation.checks import place, read_checks, relations
from diffusers_sana.evaluation.emoji_probe import EmojiProbe
from diffusers_sana.evaluation.images import to_tensor


FOLDER = Path(checkpoints.EMOJI_PROBE)


@pytest.fixture
def probe():
    return EmojiProbe(
        objects=["cat", "dog"], colors=["red", "blue"], styles=["3d", "flat"], object_features=4, layout_features=4
    ).eval()


@pytest.fixture(scope="module")
def bundled():
    return EmojiProbe.from_pretrained(FOLDER).eval()


def answer(probe: EmojiProbe, **words: str) -> None:
    """Makes the probe give these answers to every image."""
    for name, word in words.items():
        layer = probe.name_object if name == "first" else probe.name_layout[name]
        torch.nn.init.zeros_(layer.weight)
        layer.bias.data = 9.0 * torch.eye(len(probe.answers[name]))[probe.answers[name].index(word)]


@pytest.mark.parametrize("where", ["left", "right", "top", "bottom", ""])
def test_one_object(probe, where):
    answer(probe, first="dog", number="1", place=where, color="blue", style="flat")
    for observation in probe.observe(torch.rand(2, 3, 128, 128)):
        (dog,) = observation.objects
        assert dog.label == "dog"
        assert place(dog) == where
        assert dog.score > 0.99
        assert (observation.background, observation.style) == ("blue", "flat")


def test_two_objects(probe):
    answer(probe, number="2", place="top")
    images = torch.rand(4, 3, 128, 128)
    logits = probe(images)
    for i, observation in enumerate(probe.observe(images)):
        left, right = observation.objects
        assert left.label == ("cat", "dog")[logits["first"][i].argmax()]
        assert right.label == ("cat", "dog")[logits["second"][i].argmax()]
        assert relations(left, right) == {"left of"}


def test_three_objects_are_of_one_kind():
    probe = EmojiProbe(["cat", "dog"], ["red", "blue"], ["3d", "flat"], 4, 4, max_objects=3).eval()
    answer(probe, first="dog", number="3", place="left")
    (observation,) = probe.observe(torch.rand(1, 3, 128, 128))
    above, left, right = observation.objects
    assert {one.label for one in observation.objects} == {"dog"}
    assert (place(above), relations(left, right)) == ("top", {"left of"})


def test_saving(probe, tmp_path):
    probe.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    again = EmojiProbe.from_pretrained(tmp_path).eval()
    assert again.answers == probe.answers
    images = torch.rand(2, 3, 64, 64)  # of any size
    assert torch.equal(again.features(images), probe.features(images))
    assert probe.features(images).shape == (2, 12)


def test_bundled_folder(bundled):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1.6e6
    assert {path.suffix for path in FOLDER.iterdir()} == {".json", ".jsonl", ".safetensors", ".md"}
    checks = read_checks(FOLDER / "checks.jsonl")
    assert [check.seed for check in checks] == list(range(100))
    assert {label for check in checks for label in check.labels} <= set(bundled.answers["first"])
    assert {check.background for check in checks} <= set(bundled.answers["color"])
    true = load_file(FOLDER / "reference.safetensors")["features"]
    assert true.shape == (400, 256)


def test_the_bundled_probe_sees_what_the_bundled_model_draws(bundled):
    """And tells one prompt from another."""
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["an apple on a blue background, 3d style", "a penguin on a pink background, flat style"]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    seen = bundled.observe(to_tensor(pipe(prompts, generator=generators).images))
    assert [[one.label for one in observation.objects] for observation in seen] == [["apple"], ["penguin"]]
    assert [observation.background for observation in seen] == ["blue", "pink"]
