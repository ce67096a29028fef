"""How certain a figure is: 95 % confidence intervals from the images at hand.

A mean is resampled with replacement (the bootstrap, Efron 1979). Where all images of a set are right, so are those of
each resample. So the interval of a share is Wilson's, which has a width there too, and that of other equal values
counts with what was not sampled. FID and KID of a resample with replacement are biased, as some images are then
compared with themselves. They are computed for parts that are sampled without replacement (the delete-d jackknife,
Shao and Wu 1989), and only the deviation of these is used.

Legend: N images.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


NORMAL = 1.959964  # quantile 0.975 of the normal distribution
FEWEST = 6  # values that a bootstrap needs: five are all above their median, or all below it, in 6 % of the cases
Interval = tuple[float, float]


def interval_of_mean(
    values: Sequence[float], resamples: int = 1000, seed: int = 0, limits: Interval | None = None
) -> Interval:
    """Bounds of the mean of N values: quantiles 0.025 and 0.975 of the means of `resamples` resamples.

    Of equal values, this has no width, and of fewer than six too little. With `limits`, the bounds then count with
    what was not sampled: with a confidence of 97.5 %, at least the fraction 0.025^(1/N) of all values are no smaller
    than the smallest of N (Clopper and Pearson 1934; as a tolerance limit, Wilks 1941), and the others may be as small
    as they can be. The upper bound is likewise.

    Args:
        values: a random sample.
        resamples, seed: of the bootstrap.
        limits: the smallest and largest value that there can be; None if unknown.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("`values` must have at least one value, got none")
    low, high = min(values), max(values)
    if limits is not None and (len(values) < FEWEST or math.isclose(low, high, abs_tol=1e-9)):
        seen = 0.025 ** (1 / len(values))
        return seen * low + (1 - seen) * limits[0], seen * high + (1 - seen) * limits[1]
    column, generator = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(seed)
    size = (len(column),)
    means = [column[torch.randint(len(column), size, generator=generator)].mean() for _ in range(resamples)]
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def interval_of_gains(
    values: Sequence[float], others: Sequence[float], resamples: int = 1000, seed: int = 0
) -> Interval:
    """`interval_of_mean` of `values - others`, the figures of two models for the same N prompts.

    A gain is limited by the range of the figure: that of all `values`, all `others`, 0 and 1, between which shares
    are. So fewer than six gains are never significant, as in the sign test.

    Raises:
        ValueError: there is no value.
    """
    reach = max(*values, *others, 0.0, 1.0) - min(*values, *others, 0.0, 1.0)
    gains = [value - other for value, other in zip(values, others, strict=True)]
    return interval_of_mean(gains, resamples, seed, (-reach, reach))


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
