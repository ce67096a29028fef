"""What a picture of a prompt must show, and whether it does, in the manner of GenEval (arXiv 2310.11513)."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_sana.evaluation.observations import Detection, Observation
from diffusers_sana.files import read_lines


# Two boxes stand beside each other when their centres are further apart than this share of their summed sizes.
OVERLAP = 0.1
# A single object stands aside when its centre is further than this from the picture's, in fractions of the picture.
ASIDE = 0.1
RELATIONS = ("left of", "right of", "above", "below")
PLACES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Wanted:
    """Objects that must be there.

    Attributes:
        label: their class.
        count: at least so many of them.
        color: of each.
        position: one of `RELATIONS`, and the index of the entry of `include` it relates to.
        place: one of `PLACES`: where in the picture.
    """

    label: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None
    place: str | None = None


@dataclass(frozen=True)
class Check:
    """A prompt, the seed of its picture, and what the picture must show.

    Attributes:
        tag: the kind of the prompt, such as "two_object".
        include: what must be there.
        exclude: classes and the number of objects from which on there are too many.
        total: number of all objects, where it matters.
        background, style: as an `Observation` has them, where they matter.
    """

    tag: str
    prompt: str
    seed: int
    include: tuple[Wanted, ...]
    exclude: tuple[tuple[str, int], ...] = ()
    total: int | None = None
    background: str | None = None
    style: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """All classes that must be looked for."""
        return tuple(dict.fromkeys([*(item.label for item in self.include), *(label for label, _ in self.exclude)]))


def read_checks(path: Path) -> list[Check]:
    """Reads a file of checks, one JSON object a line.

    The fields are those of GenEval's `evaluation_metadata.jsonl`, which can be read as it is: `tag`, `prompt`,
    `include` (a list of `class`, `count`, `color`, `position`) and `exclude` (of `class`, `count`). Beyond those:
    `place` in `include`; `seed` (default: the number of the line, from 0), `total`, `background`, `style`.

    Raises:
        OSError: if there is no such file.
        ValueError: naming the line that is not a check.
    """
    checks = []
    for number, line in read_lines(path):
        try:
            checks.append(_read_check(json.loads(line), number - 1))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of {path} must be a check, see docs/evaluation.md: {error!r}") from error
    if not checks:
        raise ValueError(f"{path} must have at least one check, see docs/evaluation.md; it is empty")
    return checks


def _read_check(row: dict[str, Any], number: int) -> Check:
    include = tuple(
        Wanted(
            item["class"],
            item.get("count", 1),
            item.get("color"),
            (item["position"][0], item["position"][1]) if "position" in item else None,
            item.get("place"),
        )
        for item in row["include"]
    )
    for i, item in enumerate(include):
        if item.place not in (None, *PLACES):
            raise ValueError(f"`place` must be one of {PLACES}, got {item.place!r}")
        if item.position and (item.position[0] not in RELATIONS or not 0 <= item.position[1] < i):
            raise ValueError(
                f"`position` must be one of {RELATIONS} and the index of an entry before, got {item.position}"
            )
    exclude = tuple((item["class"], item["count"]) for item in row.get("exclude", ()))
    extra = {key: row.get(key) for key in ("total", "background", "style")}
    return Check(row["tag"], row["prompt"], row.get("seed", number), include, exclude, **extra)


def relations(first: Detection, second: Detection) -> set[str]:
    """Which of `RELATIONS` hold of the first object towards the second; up to two, none where they overlap much."""
    offsets = []
    for axis in (0, 1):
        distance = first.center[axis] - second.center[axis]
        slack = OVERLAP * (first.size[axis] + second.size[axis])
        offsets.append(math.copysign(max(abs(distance) - slack, 0.0), distance))
    length = math.hypot(*offsets)
    if length < 1e-3:
        return set()
    x, y = (offset / length for offset in offsets)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {name for name, true in zip(RELATIONS, holds, strict=True) if true}


def place(detection: Detection) -> str:
    """Which of `PLACES` the object stands at, or "" for the middle."""
    x, y = detection.center[0] - 0.5, detection.center[1] - 0.5
    if max(abs(x), abs(y)) <= ASIDE:
        return ""
    if abs(x) >= abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def judge(check: Check, observation: Observation) -> dict[str, bool]:
    """What of the prompt the picture shows: one entry for each property that the check asks for.

    `object`: every class is there; `count`: in the right number; `color`, `position`: of each class, of as many
    objects as asked for, the surest ones; `background` and `style`. A picture is right when all of them are.
    """
    found = {label: _surest(label, observation.objects) for label in check.labels}
    chosen = [found[item.label][: item.count] for item in check.include]
    verdict = {"object": all(chosen)}
    if check.exclude or check.total is not None or any(item.count > 1 for item in check.include):
        verdict["count"] = (
            all(
                len(objects) == item.count or item.count == 1
                for objects, item in zip(chosen, check.include, strict=True)
            )
            and all(len(found[label]) < limit for label, limit in check.exclude)
            and check.total in (None, len(observation.objects))
        )
    if any(item.color for item in check.include):
        verdict["color"] = all(
            len(objects) == item.count and all(one.color == item.color for one in objects)
            for objects, item in zip(chosen, check.include, strict=True)
            if item.color
        )
    if any(item.position or item.place for item in check.include):
        verdict["position"] = all(
            len(objects) == item.count and _stands(objects, item, chosen)
            for objects, item in zip(chosen, check.include, strict=True)
        )
    if check.background is not None:
        verdict["background"] = observation.background == check.background
    if check.style is not None:
        verdict["style"] = observation.style == check.style
    return verdict


def _surest(label: str, objects: Sequence[Detection]) -> list[Detection]:
    return sorted((one for one in objects if one.label == label), key=lambda one: -one.score)


def _stands(objects: list[Detection], item: Wanted, chosen: list[list[Detection]]) -> bool:
    if item.place and any(place(one) != item.place for one in objects):
        return False
    if item.position is None:
        return True
    relation, index = item.position
    others = chosen[index]
    return bool(others) and all(relation in relations(one, other) for one in objects for other in others)
