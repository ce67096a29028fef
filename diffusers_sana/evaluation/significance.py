"""How certain a figure is: 95 % confidence intervals from the images at hand.

A mean is resampled with replacement (the bootstrap, Efron 1979). Where all images of a set are right, so are those of
each resample; so the interval of a share is Wilson's, which has a width there too. FID and KID of a resample with
replacement are biased, as some images are then compared with themselves. They are computed for parts that are sampled
without replacement (the delete-d jackknife, Shao and Wu 1989), and only the deviation of these is used.

Legend: N images.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


NORMAL = 1.959964  # quantile 0.975 of the normal distribution
Interval = tuple[float, float]


def interval_of_mean(values: Sequence[float], resamples: int = 1000, seed: int = 0) -> Interval:
    """Bounds of the mean of N values: quantiles 0.025 and 0.975 of the means of `resamples` resamples.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("`values` must have at least one value, got none")
    column, generator = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(seed)
    size = (len(column),)
    means = [column[torch.randint(len(column), size, generator=generator)].mean() for _ in range(resamples)]
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def interval_of_share(right: int, of: int) -> Interval:
    """Wilson's bounds of a probability, of which `right` of `of` images are a sample."""
    share, spread = right / of, NORMAL**2 / of
    center = (share + spread / 2) / (1 + spread)
    half = NORMAL * math.sqrt(share * (1 - share) / of + spread / of / 4) / (1 + spread)
    return max(center - half, 0.0), min(center + half, 1.0)


def interval_of_parts(figure: float, deviation: float, part: int, of: int) -> Interval | None:
    """Bounds of a figure of `of` images, from the deviation of figures of parts of `part` images; None without parts.

    Large parts have many images in common. If a part has more than half of the images, parts vary less than
    independent sets of `of` images would.
    """
    if not 0 < part < of:
        return None
    half = NORMAL * deviation * math.sqrt(part / (of - part))
    return figure - half, figure + half


def interval_of_sets(
    statistic: Callable[[Tensor, Tensor], float],
    features: Tensor,
    others: Tensor,
    parts: int = 50,
    seed: int = 0,
) -> Interval | None:
    """Bounds of `statistic(features, others)`, from halves of both sets; None for fewer than four images.

    Args:
        statistic: at least 0, of two sets of features `[N, F]`.
        features, others: the sets. If they are equally large, they may be pairs, so the halves have the same rows.
        parts: number of halves.
        seed: of the halves.
    """
    if min(len(features), len(others)) < 4:
        return None
    generator = torch.Generator().manual_seed(seed)

    def half(rows: Tensor) -> Tensor:
        return torch.randperm(len(rows), generator=generator)[: len(rows) // 2].to(rows.device)

    figures = []
    for _ in range(parts):
        ours = half(features)
        theirs = ours if len(others) == len(features) else half(others)
        figures.append(statistic(features[ours], others[theirs]))
    deviation = float(torch.tensor(figures, dtype=torch.float64).std(correction=0))
    size = min(len(features), len(others))
    bounds = interval_of_parts(statistic(features, others), deviation, size // 2, size)
    return None if bounds is None else (max(bounds[0], 0.0), bounds[1])
