"""The best of several images of a prompt: inference-time scaling with a judge (SANA-1.5, arXiv 2501.18427)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusers_sana.checks import check_integer
from diffusers_sana.evaluation.images import to_tensor
from diffusers_sana.evaluation.judges import Judge, judged


TAKEN = ("prompt", "generator", "num_images_per_prompt", "output_type", "return_dict")


@dataclass(frozen=True)
class BestOf:
    """The choice of `best_of`, for P prompts with N images each.

    Attributes:
        images: the best image of each prompt; of equal ones the first.
        seeds: their seeds.
        scores: of all images, `[P, N]`.
        all_seeds: of all images, P lists of N.
    """

    images: list[Image.Image]
    seeds: list[int]
    scores: Tensor
    all_seeds: list[list[int]]


def best_of(
    pipe: Any,
    prompt: str | Sequence[str],
    judge: Judge,
    n: int = 4,
    *,
    seed: int = 0,
    batch_size: int = 4,
    **kwargs: Any,
) -> BestOf:
    """Generate `n` images of each prompt and keep the one with the highest score.

    `pipe(prompt, generator=torch.Generator().manual_seed(result.seeds[0]), **kwargs)` generates the image again.

    Args:
        pipe: a pipeline that returns images, such as a SanaPipeline or a SanaSprintPipeline.
        prompt: one or several.
        judge: from images `[B, 3, H, W]` in [0, 1] and B prompts to B scores; see `judges`.
        n: images per prompt.
        seed: of the first image; each further one has the next.
        batch_size: images that are generated at a time.
        **kwargs: for the pipeline.

    Raises:
        TypeError: `prompt`, `n` or `judge` is of another type.
        ValueError: there is no prompt, a number is out of range, an argument of the pipeline is one that this function
            sets, the pipeline does not return images, or the judge does not return B finite scores.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(each, str) for each in prompts):
        kind = ValueError if not prompts else TypeError
        raise kind(f"`prompt` must be a string or several, got {prompt!r}.")
    for name, value in (("n", n), ("batch_size", batch_size)):
        check_integer(name, value)
    check_integer("seed", seed, at_least=0, at_most=2**63 - 1)
    if not callable(judge):
        raise TypeError(f"`judge` must be a function of images and prompts, got {type(judge).__name__}.")
    if given := sorted(set(TAKEN) & kwargs.keys()):
        raise ValueError(f"`{given[0]}` must not be given: `best_of` sets it. Use `n` and `seed`.")
    images, scores = [], []
    every = [each for each in prompts for _ in range(n)]
    for start in range(0, len(every), batch_size):
        part = every[start : start + batch_size]
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(part))]
        made = pipe(prompt=part, generator=generators, output_type="pil", return_dict=False, **kwargs)[0]
        if len(made) != len(part) or not all(isinstance(image, Image.Image) for image in made):
            raise ValueError(f"`pipe` must return one image per prompt, but {type(pipe).__name__} does not.")
        images += made
        scores.append(judged(judge, to_tensor(made), part))
    table = torch.cat(scores).view(len(prompts), n)
    best = [index * n + int(row.argmax()) for index, row in enumerate(table)]
    seeds = [[seed + index * n + i for i in range(n)] for index in range(len(prompts))]
    return BestOf([images[at] for at in best], [seed + at for at in best], table, seeds)
