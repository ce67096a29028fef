"""How far two sets of pictures are apart, as distributions of features: FID and KID.

Legend: N pictures, F features. Everything is computed in float64.
"""

import torch
from torch import Tensor


def _check_features(features: Tensor, others: Tensor) -> None:
    for name, value in (("features", features), ("others", others)):
        if value.ndim != 2 or len(value) < 2:
            raise ValueError(f"`{name}` must be [N, F] of at least two pictures, got {tuple(value.shape)}; draw more")
    if features.shape[1] != others.shape[1]:
        raise ValueError(
            f"`others` must have as many features as `features`, {features.shape[1]}, got {others.shape[1]}; "
            "take both from one network"
        )


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Fréchet distance of two Gaussians: |m - n|² + tr(A + B - 2 (A B)^½).

    A B has the eigenvalues of the symmetric A^½ B A^½, whose square roots are summed: no root of an unsymmetric
    matrix, no complex numbers, and singular covariances are no exception.

    Args:
        mean, other_mean: `[F]`.
        covariance, other_covariance: `[F, F]`, symmetric.
    """
    mean, covariance, other_mean, other_covariance = (
        value.double() for value in (mean, covariance, other_mean, other_covariance)
    )
    root = _square_root(covariance)
    product = root @ other_covariance @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * shared
    return max(float(distance), 0.0)


def frechet_inception_distance(features: Tensor, others: Tensor) -> float:
    """FID (arXiv 1706.08500) of two sets of features `[N, F]`; their numbers may differ.

    Its bias falls with N and depends on N: compare only figures of equal numbers of pictures. With fewer pictures
    than features the covariances are singular, which is allowed.

    Raises:
        ValueError: for fewer than two pictures, or unequal F.
    """
    _check_features(features, others)
    features, others = features.double(), others.double()
    return frechet_distance(features.mean(0), torch.cov(features.T), others.mean(0), torch.cov(others.T))


def kernel_inception_distance(
    features: Tensor, others: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID (arXiv 1801.01401): squared MMD with the kernel (x·y / F + 1)³, unbiased; may come out below zero.

    Args:
        features, others: `[N, F]`; their numbers may differ.
        subsets: draws, without replacement, over which it is averaged.
        subset_size: pictures of each set in a draw; at most what there is.
        seed: of the draws.

    Returns:
        The mean, and the standard deviation over the draws.

    Raises:
        ValueError: for fewer than two pictures, unequal F, or no subset.
    """
    _check_features(features, others)
    size = min(subset_size, len(features), len(others))
    if subsets < 1 or size < 2:
        raise ValueError(f"`subsets` must be at least 1 and `subset_size` 2, got {subsets} and {subset_size}")
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)].double()

    values = torch.stack([_squared_mmd(draw(features), draw(others)) for _ in range(subsets)])
    return float(values.mean()), float(values.std(correction=0))


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_different(a: Tensor) -> Tensor:
        of_all = kernel(a, a)
        return (of_all.sum() - of_all.trace()) / (len(a) * (len(a) - 1))

    return mean_of_different(x) + mean_of_different(y) - 2 * kernel(x, y).mean()
