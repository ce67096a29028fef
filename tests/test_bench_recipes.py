"""`make recipes`: every recipe runs at tiny size, and the gain decides."""

import json

import pytest

from benchmarks import recipes
from benchmarks.recipes import RECIPES, Bench, Recipe
from diffusers_sana import FlowDPMSolverScheduler, SanaPipeline, SanaTransformer2DModel
from diffusers_sana.evaluation.checks import read_checks
from diffusers_sana.evaluation.config import PROMPTS
from tests import tiny
from tests.training.tiny import tiny_autoencoder, tiny_text_encoder, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline for 32 pixels."""
    transformer = SanaTransformer2DModel(**tiny.TRANSFORMER | {"sample_size": 8})
    parts = tiny_tokenizer(), tiny_text_encoder(), tiny_autoencoder(), transformer
    folder = tmp_path_factory.mktemp("model")
    SanaPipeline(*parts, FlowDPMSolverScheduler(flow_shift=3.0)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_each_trains_and_measures_other_prompts(name, model, tmp_path):
    """In one step nothing is gained for sure; a figure of each image is there before and after."""
    bench = Bench(
        tmp_path, model, max_steps=1, images=3, held_out=2, steps=1, checks=read_checks(PROMPTS["emoji"])[:6]
    )
    assert not set(bench.prompts) & {check.prompt for check in bench.taught}
    row = recipes.measure(RECIPES[name], bench)
    low, high = row["interval"]
    assert low <= row["gain"] <= high
    assert row["images"] == 2
    assert row["after"] == pytest.approx(row["before"] + row["gain"], abs=1e-6)
    assert (tmp_path / name / "log.jsonl").read_text().count("\n") == 1


def test_the_interval_decides(tmp_path, monkeypatch, capsys):
    """A gain of every image is sure; of one out of many, or none, it is not."""
    cases = {"sure": [1.0] * 9, "some": [1.0] + [0.0] * 8, "none": [0.0] * 9, "loss": [-1.0] * 9}
    made = {
        name: Recipe("f", lambda bench, gains=gains: ([0.5] * 9, [0.5 + g for g in gains]))
        for name, gains in cases.items()
    }
    monkeypatch.setattr(recipes, "RECIPES", made)
    command = ["--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"no sure gain by some: .*; none: gain 0\.0000, .*; loss: gain -1\.0000"):
        recipes.main(command)
    [path] = tmp_path.glob("*/recipes.json")
    report = json.loads(path.read_text())
    low, high = report["recipes"]["sure"]["interval"]
    assert 0 < low < 1 <= high
    assert report["minutes"] == 3
    recipes.main([*command, "--recipes", "sure"])
    assert list(json.loads(path.read_text())["recipes"]) == ["sure"]
    assert "sure" in capsys.readouterr().out
