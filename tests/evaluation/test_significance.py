"""Intervals of figures against known answers, and how often they hold the true value."""

import math

import pytest
import torch

from diffusers_sana.evaluation.distributions import frechet_inception_distance
from diffusers_sana.evaluation.significance import (
    interval_of_gains,
    interval_of_mean,
    interval_of_parts,
    interval_of_sets,
    interval_of_share,
)


def test_shares():
    """Wilson's bounds are where a share is 1.96 deviations of the bound from it, and have a width at both ends."""
    for right, of in ((3, 10), (57, 80), (1, 4)):
        for bound in interval_of_share(right, of):
            assert abs(right / of - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / of))
    assert interval_of_share(80, 80) == pytest.approx((80 / (80 + 1.959964**2), 1))
    assert interval_of_share(0, 80) == pytest.approx((0, 1 - 80 / (80 + 1.959964**2)))


def test_means():
    """Of many values, 1.96 standard errors on both sides; of equal ones, no width; the same at each call."""
    values = torch.randn(400, dtype=torch.float64)
    error = float(values.std(correction=0)) / 20
    low, high = interval_of_mean(values.tolist())
    assert (high - low) / error == pytest.approx(2 * 1.96, rel=0.12)
    assert (high + low) / 2 == pytest.approx(float(values.mean()), abs=0.2 * error)
    assert interval_of_mean(values.tolist()) == (low, high)
    assert interval_of_mean([3.0, 3.0]) == (3.0, 3.0)
    with pytest.raises(ValueError, match="`values` must have at least one value"):
        interval_of_mean([])


def test_equal_gains_are_not_certain():
    """As in the sign test, up to five gains of either sign are not significant, and six equal ones are."""
    for count in range(1, 6):
        low, high = interval_of_gains([1.0] * count, [0.0] * count)
        assert -1 <= low < 0 < 1 == high
        low, high = interval_of_gains([0.3, 0.31, 0.32, 0.4, 0.5][:count], [0.2] * count)
        assert low < 0.1 < high
    low, high = interval_of_gains([0.0] * 6, [1.0] * 6)
    assert (low, high) == pytest.approx((-1, 1 - 2 * 0.025 ** (1 / 6)))
    assert high < 0
    assert interval_of_mean([100.0] * 6, limits=(0, 100)) == pytest.approx((100 * 0.025 ** (1 / 6), 100))
    nearly = interval_of_gains([0.1 + 0.2] * 3 + [0.3] * 6, [0.0] * 9)  # which differ by rounding only
    assert nearly == pytest.approx(interval_of_gains([0.3] * 9, [0.0] * 9))
    gains = torch.randn(50, dtype=torch.float64).tolist()
    assert interval_of_gains(gains, [0.0] * 50) == interval_of_mean(gains)
    with pytest.raises(ValueError, match="`values` must have at least one value"):
        interval_of_gains([], [])


def test_few_gains_hold_the_true_one():
    """Five prompts, of which one in ten is lost and the others are won: the mean gain is 0.8."""
    wins = torch.rand(400, 5, generator=torch.Generator().manual_seed(0)) < 0.9
    bounds = [interval_of_gains(row.double().tolist(), (~row).double().tolist()) for row in wins]
    assert sum(low <= 0.8 <= high for low, high in bounds) >= 0.95 * len(bounds)


@pytest.mark.parametrize("part", [20, 50, 80])
def test_parts_of_any_size_say_the_error_of_the_whole(part):
    values = torch.randn(100, dtype=torch.float64)
    means = torch.stack([values[torch.randperm(100)[:part]].mean() for _ in range(2000)])
    low, high = interval_of_parts(0.0, float(means.std()), part, 100)
    assert high == -low == pytest.approx(1.96 * float(values.std()) / 10, rel=0.1)


def test_there_is_no_interval_without_parts():
    assert interval_of_parts(1.0, 0.5, 2, 2) is None
    assert interval_of_sets(frechet_inception_distance, torch.randn(3, 2), torch.randn(9, 2)) is None


def test_sets_hold_the_true_distance():
    """Two Gaussians whose distance is known; most of the intervals have it in them, none is without end."""
    true, held = 4.0 * 3, 0
    for seed in range(12):
        x, y = torch.randn(300, 3), torch.randn(200, 3) + 2
        low, high = interval_of_sets(frechet_inception_distance, x, y, parts=20, seed=seed)
        assert 1 < high - low < 6
        held += low < true < high
    assert held >= 9


def test_pairs_stay_pairs():
    """Of a set and itself every half is at distance 0."""
    x = torch.randn(40, 3)
    assert interval_of_sets(frechet_inception_distance, x, x) == pytest.approx((0, 0), abs=1e-6)
