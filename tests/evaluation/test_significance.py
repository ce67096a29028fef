"""Intervals of figures against known answers, and how often they hold the true value."""

import math

import pytest
import torch

from diffusers_sana.evaluation.distributions import frechet_inception_distance
from diffusers_sana.evaluation.significance import (
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
