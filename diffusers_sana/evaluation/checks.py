"""What an image of a prompt must show, and whether it does, as in GenEval (arXiv 2310.11513)."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_sana.evaluation.observations import Detection, Observation
from diffusers_sana.files import read_lines


# Two boxes are beside each other if their centers are further apart than this fraction of their summed sizes.
OVERLAP = 0.1
# A single object is off-center if its center is further than this from the image's, in fractions of the image.
OFF_CENTER = 0.1
RELATIONS = ("left of", "right of", "above", "below")
PLACES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Wanted:
    """Objects that must be there.

    Attributes:
        label: their class.
        count: at least this many of them.
        color: of each.
        position: one of `RELATIONS`, and the index of the entry of `include` it relates to.
        place: one of `PLACES`: where in the image.
    """

    label: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None
    place: str | None = None


@dataclass(frozen=True)
class Check:
    """A prompt, the seed of its image, and what the image must show.

    Attributes:
        tag: the kind of the prompt, such as "two_object".
        include: what must be there.
        exclude: classes, and the number of objects that is already too many.
        total: number of all objects; None: any.
        background, style: as in an `Observation`; None: any.
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
        """All classes to look for."""
        return tuple(dict.fromkeys([*(item.label for item in self.include), *(label for label, _ in self.exclude)]))


def read_checks(path: Path) -> list[Check]:
    """Reads a file of checks, one JSON object per line.

    The fields are those of GenEval's `evaluation_metadata.jsonl`, which can be read as it is: `tag`, `prompt`,
    `include` (a list of `class`, `count`, `color`, `position`) and `exclude` (a list of `class`, `count`). In
    addition: `place` in `include`; `seed` (default: the line number, from 0), `total`, `background`, `style`.

    Raises:
        OSError: there is no such file.
        ValueError: a line is not a check; the message names it.
    """
    checks = []
    for number, line in read_lines(path):
        try:
            checks.append(_read_check(json.loads(line), number - 1))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"line {number} of {path} must be a check, see docs/evaluation.md: {why}") from error
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


def check_detectable(checks: Sequence[Check], has_clip: bool) -> None:
    """Raises a ValueError if checks ask for what an object detector, with or without CLIP, does not recognize."""
    if not has_clip and any(item.color for check in checks for item in check.include):
        raise ValueError("`clip` must be given, because checks ask for colors: pass a CLIP model")
    if any(check.background or check.style for check in checks):
        raise ValueError("checks for a detector must not ask for `background` or `style`; leave those out")


def relations(first: Detection, second: Detection) -> set[str]:
    """Which of `RELATIONS` the first object has to the second: up to two, none if they overlap much."""
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
    """Which of `PLACES` the object is at, or "" for the center."""
    x, y = detection.center[0] - 0.5, detection.center[1] - 0.5
    if max(abs(x), abs(y)) <= OFF_CENTER:
        return ""
    if abs(x) >= abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def verify(check: Check, observation: Observation) -> dict[str, bool]:
    """Which properties of the prompt the image shows: one entry per property that the check asks for.

    `object`: every class is present; `count`: in the right number; `color`, `position`: hold for as many objects of
    each class as asked for, those of the highest scores; `background` and `style`. An image is right if all are.
    """
    found = {label: _by_score(label, observation.objects) for label in check.labels}
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
            len(objects) == item.count and _is_placed(objects, item, chosen)
            for objects, item in zip(chosen, check.include, strict=True)
        )
    if check.background is not None:
        verdict["background"] = observation.background == check.background
    if check.style is not None:
        verdict["style"] = observation.style == check.style
    return verdict


def _by_score(label: str, objects: Sequence[Detection]) -> list[Detection]:
    return sorted((one for one in objects if one.label == label), key=lambda one: -one.score)


def _is_placed(objects: list[Detection], item: Wanted, chosen: list[list[Detection]]) -> bool:
    if item.place and any(place(one) != item.place for one in objects):
        return False
    if item.position is None:
        return True
    relation, index = item.position
    others = chosen[index]
    return bool(others) and all(relation in relations(one, other) for one in objects for other in others)
