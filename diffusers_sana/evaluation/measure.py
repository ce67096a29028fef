"""Measures over files of images, a few in memory at a time.

Legend: N images, H/W height and width, F features.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusers_sana.evaluation.checks import Check, verify
from diffusers_sana.evaluation.distributions import frechet_inception_distance, kernel_inception_distance
from diffusers_sana.evaluation.dpg import Questioned, credited
from diffusers_sana.evaluation.features import Features
from diffusers_sana.evaluation.images import to_tensor
from diffusers_sana.evaluation.observations import Observation
from diffusers_sana.evaluation.significance import (
    interval_of_mean,
    interval_of_parts,
    interval_of_sets,
    interval_of_share,
)
from diffusers_sana.evaluation.vqa import Vqa, probabilities_of_yes
from diffusers_sana.images import read_image


Observe = Callable[[Tensor, Sequence[Check]], list[Observation]]
"""From images `[N, 3, H, W]` in [0, 1] and their N checks to what the images show."""
LIMITS = {"dpg": (0.0, 100.0)}  # the smallest and largest value of a figure per image, where it has them


def batches(paths: Sequence[Path], size: int = 16) -> Iterator[Tensor]:
    """Images `[n, 3, H, W]` in [0, 1], in order; a batch ends early if the next image has another size."""
    batch: list[Image.Image] = []
    for path in paths:
        image = read_image(path)
        if batch and (len(batch) == size or image.size != batch[0].size):
            yield to_tensor(batch)
            batch = []
        batch.append(image)
    if batch:
        yield to_tensor(batch)


def collect_features(paths: Sequence[Path], network: Features) -> Tensor:
    """`[N, F]`, on the CPU."""
    with torch.no_grad():
        return torch.cat([network(images).float().cpu() for images in batches(paths)])


def check_scenes(paths: Sequence[Path], checks: Sequence[Check], observe: Observe) -> dict[str, Any]:
    """Fractions of images that show what their prompts say.

    Returns:
        `correct`: the fraction of images that are right in every property; `by_tag`: the same per kind of prompt;
        `by_property`: the fraction right in this property, of the images whose check asks for it; each with `of`,
        the number of images, and `interval`, where it is with 95 % confidence; `verdicts`: the result per image.
    """
    verdicts: list[dict[str, bool]] = []
    for images in batches(paths):
        asked = checks[len(verdicts) : len(verdicts) + len(images)]
        seen = observe(images, asked)
        verdicts += [verify(check, observation) for check, observation in zip(asked, seen, strict=True)]
    tags, properties = defaultdict(list), defaultdict(list)
    for check, verdict in zip(checks, verdicts, strict=True):
        tags[check.tag].append(all(verdict.values()))
        for name, right in verdict.items():
            properties[name].append(right)
    return {
        "correct": _fraction([all(verdict.values()) for verdict in verdicts]),
        "by_tag": {tag: _fraction(rights) for tag, rights in tags.items()},
        "by_property": {name: _fraction(rights) for name, rights in properties.items()},
        "verdicts": [
            {"prompt": check.prompt, "seed": check.seed, **verdict}
            for check, verdict in zip(checks, verdicts, strict=True)
        ],
    }


def _fraction(rights: list[bool]) -> dict[str, Any]:
    right, of = sum(rights), len(rights)
    return {"share": right / of, "of": of, "interval": list(interval_of_share(right, of))}


def score_images(
    paths: Sequence[Path], texts: Sequence[str], judge: Callable[[Tensor, list[str]], Tensor]
) -> list[float]:
    """The score of each image and its text by a judge, such as `Clip.scores`."""
    found: list[float] = []
    for images in batches(paths):
        found += judge(images, list(texts[len(found) : len(found) + len(images)])).tolist()
    return found


def mean_of(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The mean of a figure of all images as `name`, and its interval of 95 % as `..._interval`."""
    interval = interval_of_mean(values, limits=LIMITS.get(name))
    return {name: sum(values) / len(values), f"{name}_interval": list(interval)}


def ask_questions(paths: Sequence[Path], prompts: Sequence[Questioned], vqa: Vqa) -> dict[str, Any]:
    """DPG-Bench: the share of the questions about each image that are answered with yes, as are their parents.

    Returns:
        `by_category`: the fraction of yes of each category and each broad one, of all questions, as in the authors'
        program; `scores`: of each image, 0 to 100; `answers`: of each image, by the number of the question.
    """
    scores, every, categories = [], [], defaultdict(list)
    for image, asked in zip(batches(paths, 1), prompts, strict=True):
        questions = [question.text for question in asked.questions]
        odds = probabilities_of_yes(vqa(image.expand(len(questions), -1, -1, -1), questions), len(questions))
        answers = {question.number: odd > 0.5 for question, odd in zip(asked.questions, odds.tolist(), strict=True)}
        counted = credited(asked.questions, answers)
        scores.append(100 * sum(counted.values()) / len(counted))
        every.append(answers)
        for question in asked.questions:
            for category in dict.fromkeys((question.category.partition("-")[0].strip(), question.category)):
                categories[category].append(answers[question.number])
    by_category = {category: _fraction(categories[category]) for category in sorted(categories)}
    return {"by_category": by_category, "scores": scores, "answers": every}


def compare_pairs(
    paths: Sequence[Path], others: Sequence[Path], measures: dict[str, Callable[[Tensor, Tensor], Tensor]]
) -> dict[str, Any]:
    """Mean of each measure over pairs of images.

    Returns:
        The mean of each measure, and its interval of 95 % as `..._interval`; `pairs`; `equal_pairs`, which have no
        finite PSNR and are left out of its mean: None if all pairs are equal.
    """
    columns: dict[str, list[float]] = {name: [] for name in measures}
    equal = 0
    for image, other in zip(batches(paths, 1), batches(others, 1), strict=True):
        equal += torch.equal(image, other)
        for name, measure in measures.items():
            columns[name].append(float(measure(image, other)))
    finite = {name: [value for value in column if value != float("inf")] for name, column in columns.items()}
    figures: dict[str, Any] = {}
    for name, column in finite.items():
        figures[name] = sum(column) / len(column) if column else None
        figures[f"{name}_interval"] = list(interval_of_mean(column)) if column else None
    return figures | {"pairs": len(paths), "equal_pairs": equal}


def compare_sets(features: Tensor, others: Tensor, measures: Collection[str], seed: int = 0) -> dict[str, Any]:
    """FID and KID of two sets of features `[N, F]`, those of `measures` ("fid", "kid"), and the sizes of the sets.

    Returns:
        `images`, `others`, `features`: the sizes; `fid`, `kid`; `fid_interval`, `kid_interval`: their intervals of
        95 %, or None where there are too few images; `kid_deviation`: of the subsets whose mean `kid` is.
    """
    result: dict[str, Any] = {"images": len(features), "others": len(others), "features": features.shape[1]}
    if "fid" in measures:
        result["fid"] = frechet_inception_distance(features, others)
        result["fid_interval"] = interval_of_sets(frechet_inception_distance, features, others, seed=seed)
    if "kid" in measures:
        size = max(2, min(1000, min(len(features), len(others)) // 2))  # subsets of all images would all be equal
        result["kid"], result["kid_deviation"] = kernel_inception_distance(
            features, others, subset_size=size, seed=seed
        )
        least = min(len(features), len(others))
        result["kid_interval"] = interval_of_parts(result["kid"], result["kid_deviation"], size, least)
    return result
