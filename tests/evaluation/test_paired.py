"""Differences of two evaluations, with known answers, and how often their intervals hold the true one."""

import json

import pytest
import torch

from diffusers_sana.evaluation.paired import compare_reports, differences
from diffusers_sana.evaluation.report import markdown, read_report


def report(rights, scores=None, prompts=None, name="model"):
    """Of images with one property, and perhaps scores."""
    prompts = prompts or [f"p{i}" for i in range(len(rights))]
    images = [{"prompt": prompt, "seed": i, "tag": "ab"[i % 2]} for i, prompt in enumerate(prompts)]
    verdicts = [
        {"prompt": image["prompt"], "seed": image["seed"], "object": right, "color": True}
        for image, right in zip(images, rights, strict=True)
    ]
    figures = {"scenes": {"verdicts": verdicts}} | ({"per_image": {"pickscore": scores}} if scores else {})
    return {
        "images": images,
        "models": {name: figures, "reference": {}},
        "settings": {},
        "versions": {},
        "against": {},
    }


def test_prompts_are_compared_with_themselves():
    """All images gain a little, which the spread between prompts hides where figures are compared as a whole."""
    base = torch.randn(50).mul(10).tolist()
    scores = [value + 1 + (-1) ** i / 100 for i, value in enumerate(base)]
    found = compare_reports(report([True] * 50, scores), report([True] * 50, base))
    row = found["pickscore"]
    assert row["difference"] == pytest.approx(1)
    assert row["interval"] == pytest.approx([1, 1], abs=0.01)
    assert row["figure"] - row["other"] == pytest.approx(1)
    row = found["correct"]
    assert (row["prompts"], row["figure"], row["other"], row["difference"]) == (50, 1, 1, 0)
    assert row["interval"] == pytest.approx([-0.071, 0.071], abs=1e-3)  # of 50 prompts alike; others may differ


def test_rows_and_prompts_in_common():
    ours = report([True, True, False, True])
    theirs = report([False, True, True], prompts=["p1", "p0", "p9"])
    found = compare_reports(ours, theirs)
    assert {name: (row["prompts"], row["difference"]) for name, row in found.items()} == {
        "correct": (2, 0.5),
        "right object": (2, 0.5),
        "right color": (2, 0.0),
    }
    with pytest.raises(ValueError, match="there is none of both"):
        compare_reports(ours, report([True], prompts=["q"]))


def test_images_of_one_prompt_count_as_one():
    """So two images of each prompt do not make the interval narrower than the prompts allow."""
    ours = {"score": {f"p{i}": [float(i % 2)] * 4 for i in range(20)}}
    theirs = {"score": {f"p{i}": [0.0] for i in range(20)}}
    row = differences(ours, theirs)["score"]
    assert (row["prompts"], row["difference"]) == (20, 0.5)
    low, high = row["interval"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20**0.5, rel=0.15)
    assert differences({"score": {"p": [1.0]}}, {"score": {"p": [0.0]}})["score"]["interval"] is None


def test_the_interval_holds_the_true_difference():
    """95 % of the time; of 40 trials at least 34."""
    held = 0
    for seed in range(40):
        torch.manual_seed(seed)
        hard = torch.randn(60) * 5
        ours, theirs = (
            {"score": {str(i): [value] for i, value in enumerate((hard + shift + torch.randn(60)).tolist())}}
            for shift in (0.5, 0.0)
        )
        low, high = differences(ours, theirs, resamples=400)["score"]["interval"]
        held += low < 0.5 < high
        assert high - low < 1.2  # narrower than the 3.6 of figures whose prompts are not the same
    assert held >= 34


def test_the_page_says_what_is_significant():
    ours, theirs = report([True] * 30, list(range(30))), report([False] * 30, [29 - i for i in range(30)])
    against = {"other": {"differences": compare_reports(ours, theirs)}}
    page = markdown(ours | {"models": {}, "against": against})
    assert "| correct | 100.0 | 0.0 | 100.0 (76.9 to 100.0) | 30 | yes |" in page
    line = next(line for line in page.splitlines() if line.startswith("| PickScore | 14.5"))
    assert line.endswith("| 30 | no |")


def test_what_is_no_report(tmp_path):
    path = tmp_path / "report.json"
    for content, message in (([], "has no `models`"), ({"models": {"m": {}}}, "Run its evaluation again")):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_report(path)
