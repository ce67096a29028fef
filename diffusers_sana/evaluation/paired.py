"""Two evaluations of the same prompts: how they differ, and whether that could be chance.

A prompt is easy or hard for both models. So the differences are taken per prompt, and the interval is that of their
mean (`significance.interval_of_gains`), which is more precise than to compare the intervals of both figures. Several
images of a prompt count as one, by their mean.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers_sana.evaluation.significance import interval_of_gains


ByPrompt = dict[str, list[float]]


def compare_reports(report: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How the figures of the first model of a report differ from those of another report.

    Args:
        report, other: of `evaluate`, or read by `report.read_report`.

    Returns:
        Name of a figure that both have per image -> `prompts`, the number of those that both have; `figure` and
        `other`, the means over these; `difference`; and its `interval` of 95 %, None of a single prompt. The
        difference is significant where the interval excludes 0.

    Raises:
        ValueError: the reports have no figure of the same prompt.
    """
    ours, theirs = (_of_first_model(each) for each in (report, other))
    found = differences(ours, theirs)
    if not found:
        raise ValueError("the reports must have a figure per image of the same prompts, but there is none of both")
    return found


def differences(
    ours: Mapping[str, ByPrompt], theirs: Mapping[str, ByPrompt], resamples: int = 2000
) -> dict[str, dict[str, Any]]:
    """As `compare_reports`, of figures by prompt."""
    found: dict[str, dict[str, Any]] = {}
    for name in [name for name in ours if name in theirs]:
        prompts = [prompt for prompt in ours[name] if prompt in theirs[name]]
        if not prompts:
            continue
        mine, its = ([_mean(of[name][prompt]) for prompt in prompts] for of in (ours, theirs))
        found[name] = {
            "prompts": len(prompts),
            "figure": _mean(mine),
            "other": _mean(its),
            "difference": _mean(mine) - _mean(its),
            "interval": list(interval_of_gains(mine, its, resamples)) if len(prompts) > 1 else None,
        }
    return found


def figures_by_prompt(figures: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> dict[str, ByPrompt]:
    """The figures per image of one model, by prompt.

    Args:
        figures: of `evaluate` for a model: `scenes` with its `verdicts`, and `per_image`.
        images: `prompt` and `tag` of each image.
    """
    found: dict[str, ByPrompt] = defaultdict(lambda: defaultdict(list))
    verdicts = figures["scenes"]["verdicts"] if "scenes" in figures else []
    for image, verdict in zip(images if verdicts else (), verdicts, strict=True):
        rights = {name: float(right) for name, right in verdict.items() if isinstance(right, bool)}
        correct = float(all(rights.values()))
        for name, right in {"correct": correct, f"prompts of {image['tag']}": correct}.items():
            found[name][image["prompt"]].append(right)
        for name, right in rights.items():
            found[f"right {name}"][image["prompt"]].append(right)
    for name, column in figures.get("per_image", {}).items():
        for image, value in zip(images, column, strict=True):
            found[name][image["prompt"]].append(value)
    return found


def _of_first_model(report: Mapping[str, Any]) -> dict[str, ByPrompt]:
    return figures_by_prompt(next(iter(report["models"].values())), report["images"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
