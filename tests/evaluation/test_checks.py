"""Which images count as correct, by lists of detections made by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffusers_sana import evaluation
from diffusers_sana.evaluation.checks import Check, Wanted, place, read_checks, relations, verify
from diffusers_sana.evaluation.observations import Detection, Observation


def at(label: str, x: float, y: float, side: float = 0.2, score: float = 0.9, color: str | None = None) -> Detection:
    return Detection(label, score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2), color)


def seen(*objects: Detection, **rest) -> Observation:
    return Observation(objects, **rest)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.2, 0.5, {"left of"}),
        (0.8, 0.5, {"right of"}),
        (0.5, 0.1, {"above"}),
        (0.5, 0.9, {"below"}),
        (0.2, 0.2, {"left of", "above"}),
        (0.47, 0.5, set()),  # within the slack
    ],
)
def test_relations(x, y, expected):
    assert relations(at("cat", x, y), at("dog", 0.5, 0.5)) == expected


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [(0.3, 0.5, "left"), (0.7, 0.6, "right"), (0.5, 0.2, "top"), (0.45, 0.8, "bottom"), (0.55, 0.45, "")],
)
def test_place(x, y, expected):
    assert place(at("cat", x, y)) == expected


def test_two_objects():
    check = Check("two_object", "a cat and a dog", 0, (Wanted("cat"), Wanted("dog")))
    cat, dog = at("cat", 0.2, 0.5), at("dog", 0.8, 0.5)
    assert verify(check, seen(cat, dog)) == {"object": True}
    assert verify(check, seen(cat, at("bird", 0.8, 0.5))) == {"object": False}
    assert verify(check, seen()) == {"object": False}


def test_counting():
    check = Check("counting", "two cats", 0, (Wanted("cat", 2),), exclude=(("cat", 3),))
    cats = [at("cat", 0.2 * i, 0.5) for i in range(1, 4)]
    assert [verify(check, seen(*cats[:n]))["count"] for n in (0, 1, 2, 3)] == [False, False, True, False]
    assert verify(check, seen(*cats, at("dog", 0.9, 0.9)))["object"]
    one = Check("single", "a cat", 0, (Wanted("cat"),), total=1)
    assert [verify(one, seen(*cats[:n]))["count"] for n in (1, 2)] == [True, False]


def test_colors():
    check = Check(
        "color_attr", "a red cat and a blue dog", 0, (Wanted("cat", color="red"), Wanted("dog", color="blue"))
    )
    red, blue = at("cat", 0.2, 0.5, color="red"), at("dog", 0.8, 0.5, color="blue")
    assert verify(check, seen(red, blue)) == {"object": True, "color": True}
    assert verify(check, seen(replace(red, color="blue"), blue)) == {"object": True, "color": False}
    assert verify(check, seen(red)) == {"object": False, "color": False}
    # The surest cat is the one that must be red.
    assert not verify(check, seen(red, blue, at("cat", 0.5, 0.5, score=0.95, color="green")))["color"]
    assert verify(check, seen(red, blue, at("cat", 0.5, 0.5, score=0.5, color="green")))["color"]


def test_positions():
    check = Check("position", "a cat left of a dog", 0, (Wanted("dog"), Wanted("cat", position=("left of", 0))))
    dog = at("dog", 0.6, 0.5)
    assert verify(check, seen(at("cat", 0.2, 0.5), dog)) == {"object": True, "position": True}
    assert verify(check, seen(at("cat", 0.9, 0.5), dog)) == {"object": True, "position": False}
    assert verify(check, seen(at("cat", 0.2, 0.5))) == {"object": False, "position": False}
    aside = Check("position", "a cat on the left", 0, (Wanted("cat", place="left"),))
    assert verify(aside, seen(at("cat", 0.2, 0.5)))["position"]
    assert not verify(aside, seen(at("cat", 0.5, 0.5)))["position"]


def test_background_and_style():
    check = Check("single", "a flat cat on red", 0, (Wanted("cat"),), background="red", style="flat")
    cat = at("cat", 0.5, 0.5)
    assert verify(check, seen(cat, background="red", style="3d")) == {
        "object": True,
        "background": True,
        "style": False,
    }


def test_reads_the_files_of_geneval(tmp_path):
    rows = [
        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
        {"tag": "position", "include": [{"class": "dog"}, {"class": "cat", "position": ["above", 0]}], "seed": 7},
    ]
    path = tmp_path / "checks.jsonl"
    path.write_text("".join(json.dumps(row | {"prompt": "p"}) + "\n" for row in rows))
    counting, position = read_checks(path)
    assert counting == Check("counting", "p", 0, (Wanted("cat", 2),), exclude=(("cat", 3),))
    assert position.seed == 7
    assert position.include[1].position == ("above", 0)
    assert position.labels == ("dog", "cat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "line 1 of"),
        ('{"tag": "x", "prompt": "p"}', "include"),
        ('{"tag": "x", "prompt": "p", "include": [{"class": "cat", "place": "middle"}]}', "`place` must be one of"),
        ('{"tag": "x", "prompt": "p", "include": [{"class": "cat", "position": ["above", 0]}]}', "an entry before"),
        ("", "at least one check"),
    ],
)
def test_errors(text, message, tmp_path):
    (tmp_path / "checks.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_checks(tmp_path / "checks.jsonl")


def test_the_pinned_prompts():
    checks = read_checks(Path(evaluation.__file__).parent / "coco.jsonl")
    assert [check.seed for check in checks] == list(range(100))
    assert {check.tag for check in checks} == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr",
    }  # fmt: skip
    for check in checks:
        assert all(item.label in check.prompt for item in check.include)
