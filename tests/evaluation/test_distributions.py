"""FID and KID against known answers."""

import itertools

import pytest
import torch

from diffusers_sana.evaluation.distributions import (
    frechet_distance,
    frechet_inception_distance,
    kernel_inception_distance,
)


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


def test_gaussians_along_the_axes():
    """Sum of squared differences of means and of standard deviations, in any common rotation."""
    a, b = torch.rand(2, 6, dtype=torch.float64) + 0.1
    m, n = torch.randn(2, 6, dtype=torch.float64)
    expected = float((m - n).square().sum() + (a - b).square().sum())
    assert frechet_distance(m, a.square().diag(), n, b.square().diag()) == pytest.approx(expected, rel=1e-12)
    r = rotation(6)
    turned = (r @ m, r @ a.square().diag() @ r.T, r @ n, r @ b.square().diag() @ r.T)
    assert frechet_distance(*turned) == pytest.approx(expected, rel=1e-10)


def test_gaussians_that_do_not_commute():
    """The eigenvalues of the unsymmetric product give the same."""
    x, y = torch.randn(2, 5, 9, dtype=torch.float64)
    a, b, zero = x @ x.T, y @ y.T, torch.zeros(5, dtype=torch.float64)
    shared = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    expected = float(a.trace() + b.trace() - 2 * shared)
    assert expected > 1
    assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-10)


def test_fid_with_fewer_images_than_features():
    """Singular covariances: a set is at distance 0 from itself, and at |d|² from itself moved by d."""
    x, d = torch.randn(10, 64), torch.randn(64)
    assert frechet_inception_distance(x, x) == pytest.approx(0, abs=1e-5)
    assert frechet_inception_distance(x, x + d) == pytest.approx(float(d.square().sum()), rel=1e-5)
    assert frechet_inception_distance(x, 2 * x) == pytest.approx(
        float(x.double().mean(0).square().sum() + torch.cov(x.double().T).trace()), rel=1e-6
    )


@pytest.mark.parametrize("sizes", [(10, 40), (40, 10), (7, 7), (30, 40)], ids=str)
def test_fid_is_the_distance_of_the_moments(sizes):
    """Of few images it is computed without the covariances; in float64 both ways agree."""
    x, y = (torch.randn(size, 20, dtype=torch.float64) + size for size in sizes)
    moments = (x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert frechet_inception_distance(x, y) == pytest.approx(frechet_distance(*moments), rel=1e-6)


def test_kid_is_the_formula():
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64) + 1

    def kernel(a, b):
        return float((a @ b / 3 + 1) ** 3)

    within = sum(kernel(a, b) for s in (x, y) for a, b in itertools.permutations(s, 2)) / 20
    across = sum(kernel(a, b) for a in x for b in y) / 25
    mean, deviation = kernel_inception_distance(x, y, subsets=3)
    assert mean == pytest.approx(within - 2 * across, rel=1e-12)
    assert deviation == pytest.approx(0, abs=1e-9)  # each subset is the whole set


def test_kid_is_unbiased():
    """Of one distribution it comes out as often below zero as above, and its mean is zero."""
    values = torch.tensor(
        [kernel_inception_distance(torch.randn(20, 4), torch.randn(20, 4), subsets=1)[0] for _ in range(400)]
    )
    assert values.min() < 0 < values.max()
    assert values.mean().abs() < 4 * values.std() / 20
    assert kernel_inception_distance(torch.randn(50, 4), torch.randn(50, 4) + 1)[0] > 10 * values.std()


def test_kid_draws_by_seed():
    x, y = torch.randn(30, 4), torch.randn(40, 4)
    first, again, other = (kernel_inception_distance(x, y, subsets=4, subset_size=10, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first[0] != other[0]
    assert first[1] > 0


@pytest.mark.parametrize("distance", [frechet_inception_distance, kernel_inception_distance])
def test_errors(distance):
    with pytest.raises(ValueError, match=r"`others` must be .* of at least two images, got \(1, 4\)"):
        distance(torch.randn(3, 4), torch.randn(1, 4))
    with pytest.raises(ValueError, match="as many features as `features`, 4, got 5"):
        distance(torch.randn(3, 4), torch.randn(3, 5))
    with pytest.raises(ValueError, match="`subsets` must be at least 1"):
        kernel_inception_distance(torch.randn(3, 4), torch.randn(3, 4), subsets=0)


class Flat(torch.nn.Module):
    """Images whose pixels are their features."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def test_fid_and_kid_are_those_of_torchmetrics():
    """Of the same features; with subsets of all images, whose order changes nothing."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = torch.rand(40, 3, 2, 2), torch.rand(40, 3, 2, 2) ** 2
    fid = FrechetInceptionDistance(feature=Flat()).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=Flat(), subsets=2, subset_size=40)
    for theirs in (fid, kid):
        theirs.update(x.double(), real=True)
        theirs.update(y.double(), real=False)
    found = frechet_inception_distance(x.flatten(1), y.flatten(1))
    assert found == pytest.approx(float(fid.compute()), rel=1e-6)
    found, _ = kernel_inception_distance(x.flatten(1), y.flatten(1), subsets=1)
    assert found == pytest.approx(float(kid.compute()[0]), rel=1e-6)
