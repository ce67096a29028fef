"""`diffusers-sana evaluate`."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageStat

from diffusers_sana import SanaPipeline, cli
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.evaluation.config import EvaluationConfig, spread
from diffusers_sana.evaluation.run import evaluate as evaluate_in_python
from tests import tiny
from tests.cli.commands import run
from tests.evaluation.test_vqa import write as write_questions


FAST = ["--steps", "2", "--limit", "4", "--batch-size", "4", "--dtype", "float32"]


def evaluate(out, *options: str, model: str = "sana-emoji") -> dict:
    cli.main(["evaluate", model, "--out", str(out), *FAST, *options])
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder with a finished evaluation, and its report."""
    out = tmp_path_factory.mktemp("evaluated")
    return out, evaluate(out)


def test_with_nothing_else(evaluated):
    out, report = evaluated
    figures = report["models"]["sana-emoji"]
    assert figures["scenes"]["correct"]["of"] == 4
    assert {"object", "count", "background", "style"} <= figures["scenes"]["by_property"].keys()
    assert figures["true_images"].keys() >= {"fid", "kid"}
    assert report["against"] == {}
    assert sorted(path.name for path in (out / "images").glob("*.png")) == [f"0000{i}.png" for i in range(4)]
    page = (out / "report.md").read_text()
    assert "| right background |" in page
    assert "FID, to true images" in page


def test_called_again_it_generates_nothing(evaluated, monkeypatch, capsys):
    out, report = evaluated
    monkeypatch.setattr("diffusers_sana.evaluation.run.load_pipeline", None)  # would fail
    assert evaluate(out) == report
    assert str(out / "report.md") in capsys.readouterr().out


def test_from_python(evaluated, monkeypatch):
    """The same report as from the command line."""
    out, report = evaluated
    monkeypatch.setattr("diffusers_sana.evaluation.run.load_pipeline", None)
    config = EvaluationConfig(model="sana-emoji", out=out, steps=2, limit=4, batch_size=4, dtype="float32")
    assert json.loads(json.dumps(evaluate_in_python(config))) == report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checks": ["speed"]}, "`checks` must be of scenes, clip"),
        ({"limit": 0}, "`limit` must be at least 1, got 0"),
        ({"features": "vgg"}, "`features` must be one of probe, inception, clip, got 'vgg'"),
        ({"reference_model": "x", "against": "y"}, "`reference_model` and `against` must not both be given"),
        ({"model": "no/such/folder", "prompts": "emoji"}, "no/such/folder"),
    ],
)
def test_errors_in_python(options, message):
    with pytest.raises((ValueError, OSError), match=message):
        EvaluationConfig(**{"model": "sana-emoji", **options})


def test_against_a_folder(evaluated, tmp_path, monkeypatch):
    """Against its own images nothing differs."""
    out, _ = evaluated
    monkeypatch.setattr("diffusers_sana.evaluation.run.load_pipeline", None)
    checks = ["--checks", "psnr", "ssim", "fid"]
    report = evaluate(out, "--against", str(out / "images"), *checks)
    (figures,) = report["against"].values()
    assert figures["equal_pairs"] == figures["pairs"] == 4
    assert figures["ssim"] == pytest.approx(1)
    assert figures["fid"] == pytest.approx(0, abs=1e-6)
    Image.new("RGB", (128, 128)).save(tmp_path / "only.png")
    command = ["evaluate", "sana-emoji", "--out", str(out), *FAST, "--against", str(tmp_path), *checks]
    assert "--against must be a folder of as many images as there are prompts, 4" in run(*command).error


def test_against_a_report(evaluated, tmp_path, monkeypatch):
    """Of another evaluation of the same prompts: itself, with judges that the package of one stands in for."""
    out, _ = evaluated
    monkeypatch.setattr("diffusers_sana.evaluation.run.load_pipeline", None)

    def score(images, prompt, hps_version):
        return [sum(ImageStat.Stat(image).mean) / 765 for image in images]

    monkeypatch.setitem(sys.modules, "hpsv2", SimpleNamespace(score=score, __spec__=True))
    checks = ["--checks", "scenes", "hpsv2", "vqascore", "--vqa", "tests.evaluation.test_vqa:brightness"]
    first = evaluate(out, *checks)
    (figures,) = first["models"].values()
    assert figures["per_image"]["hpsv2"] == pytest.approx(figures["per_image"]["vqascore"], abs=0.02)
    low, high = figures["hpsv2_interval"]
    assert low <= figures["hpsv2"] <= high
    other = tmp_path / "other.json"
    scores = [value - 0.1 for value in figures["per_image"]["hpsv2"]]
    other.write_text(json.dumps(first | {"models": {"m": figures | {"per_image": {"hpsv2": scores}}}}))
    report = evaluate(out, *checks, "--against", str(other))
    found = report["against"][str(other)]["differences"]
    assert found["hpsv2"]["difference"] == pytest.approx(0.1)
    low, high = found["hpsv2"]["interval"]  # of few prompts, so that equal gains prove nothing
    assert low < 0 < 0.1 < high
    low, high = found["correct"]["interval"]
    assert low < 0 < high
    page = (out / "report.md").read_text()
    assert "| measure | figure | other | difference | prompts | significant |" in page
    other.write_text(json.dumps(first | {"images": [{"prompt": "another", "seed": 0, "tag": "any"}]}))
    ended = run("evaluate", "sana-emoji", "--out", str(out), *FAST, "--against", str(other))
    assert "--against must be a report of some of the same prompts" in ended.error


def test_dpg_bench(folder, tmp_path):
    """Its prompts and questions, answered by a function that says no to all."""
    questions = write_questions(tmp_path)
    options = ["--prompts", str(questions), "--vqa", "tests.evaluation.test_vqa:brightness", "--steps", "1"]
    report = evaluate(tmp_path / "out", *options, model=folder)
    (figures,) = report["models"].values()
    assert [image["prompt"] for image in report["images"]] == ["a red cat, beside a dog", "a dog"]
    assert (figures["dpg"], figures["per_image"]["dpg"]) == (0, [0, 0])
    assert figures["dpg_answers"][0] == dict.fromkeys("1234", False)
    assert "| DPG-Bench, attribute - color | 0 % of 1" in (tmp_path / "out" / "report.md").read_text()


def test_four_bits_beside_sixteen(tmp_path):
    report = evaluate(tmp_path, "--limit", "2", "--quantize", "int4", "--reference-model", "sana-emoji")
    assert list(report["models"]) == ["sana-emoji, int4", "sana-emoji"]
    figures = report["against"]["sana-emoji"]
    assert figures["differences"]["correct"]["prompts"] == 2
    assert figures["equal_pairs"] == 0
    assert "fid" in figures
    assert "kid" not in figures
    assert 15 < figures["psnr_db"] < 60
    assert 0.5 < figures["ssim"] < 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.write_official_folder(tmp_path_factory.mktemp("official")))


def test_other_prompts(folder, evaluated, tmp_path):
    """A file of checks, features of the probe, and a model that knows nothing of emoji."""
    checks = tmp_path / "checks.jsonl"
    rows = [{"tag": "any", "prompt": f"a {label}", "include": [{"class": label}]} for label in ("cat", "dog")]
    checks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--prompts", str(checks), "--features", "probe", "--against", str(evaluated[0] / "images")]
    report = evaluate(tmp_path / "out", *options, model=folder)
    (figures,) = report["against"].values()
    assert figures["images"] == 2
    assert figures["others"] == 4
    assert figures["fid"] > 0
    assert report["models"][folder] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--checks has nothing to measure with"),
        (["--checks", "scenes"], "needs --detector"),
        (["--checks", "clip"], "needs --clip"),
        (["--checks", "vqascore"], "--checks vqascore needs --vqa"),
        (["--checks", "hpsv2"], "pip install hpsv2"),
        (["--checks", "imagereward"], "pip install image-reward"),
        (["--checks", "dpg", "--vqa", "x"], r"--prompts dpg_bench.csv; got --prompts coco"),
        (["--checks", "psnr"], "need --reference-model or --against"),
        (["--checks", "kid", "--reference-model", "x"], "--checks kid needs --against"),
        (["--checks", "fid", "--features", "clip", "--reference-model", "x"], "--features clip needs --clip"),
        (["--checks", "fid", "--reference-model", "x"], "pip install torch-fidelity"),
        (["--checks", "lpips", "--reference-model", "x"], "pip install lpips"),
        (["--checks", "ssim", "--reference-model", "x"], "pip install scikit-image"),
        (["--against", "no/such/folder"], "there is no folder no/such/folder"),
        (["--prompts", "no-such-file.jsonl"], r"no-such-file\.jsonl"),
        (["--limit", "0", "--clip", "x"], "--limit: must be at least 1"),
    ],
)
def test_errors_before_anything_is_generated(folder, options, message, tmp_path, monkeypatch):
    for package in ("lpips", "torch_fidelity", "skimage", "hpsv2", "ImageReward"):
        monkeypatch.setitem(sys.modules, package, None)
    ended = run("evaluate", folder, "--out", str(tmp_path / "out"), *options)
    assert re.search(message, ended.error)
    assert ended.code
    assert not (tmp_path / "out").exists()


def test_spread():
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread(range(3), 7) == spread(range(3), None) == [0, 1, 2]


def test_files_of_a_variant(tmp_path):
    """`--variant` chooses the weights; a folder where a call failed before its first image can be used again."""
    folder = tmp_path / "model"
    SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32).save_pretrained(folder, variant="fp16")
    options = ("--prompts", "emoji", *FAST, "--checks", "scenes", "--out", str(tmp_path / "out"))
    assert run("evaluate", str(folder), *options).code != 0  # there are no files without a variant
    ended = run("evaluate", str(folder), "--variant", "fp16", *options)
    assert (ended.code, (tmp_path / "out" / "report.json").is_file()) == (0, True)
