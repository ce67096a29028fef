"""Distances between the distributions of two sets of images: FID and KID.

Legend: N images, F features. Everything is computed in float64.
"""

import torch
from torch import Tensor


def _check_features(features: Tensor, others: Tensor) -> None:
    for name, value in (("features", features), ("others", others)):
        if value.ndim != 2 or len(value) < 2:
            raise ValueError(
                f"`{name}` must be [N, F] of at least two images, got {tuple(value.shape)}; generate more"
            )
    if features.shape[1] != others.shape[1]:
        raise ValueError(
            f"`others` must have as many features as `features`, {features.shape[1]}, got {others.shape[1]}; "
            "compute both with the same network"
        )


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Fréchet distance of two Gaussians: |m - n|² + tr(A + B - 2 (A B)^½).

    The trace of (A B)^½ is the sum of the square roots of the eigenvalues of A B, which are those of the symmetric
    A^½ B A^½. So no nonsymmetric matrix is decomposed, no complex numbers occur, and covariances may be singular.

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
    """FID (arXiv 1706.08500) of two sets of features `[N, F]`; their N may differ.

    Its bias depends on N and falls with it: compare only figures of equal numbers of images. With fewer images than
    features the covariances are singular, which is allowed.

    Raises:
        ValueError: for fewer than two images, or unequal F.
    """
    _check_features(features, others)
    features, others = features.double(), others.double()
    if min(len(features), len(others)) >= features.shape[1]:
        return frechet_distance(features.mean(0), torch.cov(features.T), others.mean(0), torch.cov(others.T))
    # With A = x.T x and B = y.T y, the trace of (A B)^½ is the sum of the singular values of x y.T, which is smaller.
    mean, other_mean = features.mean(0), others.mean(0)
    x, y = (features - mean) / (len(features) - 1) ** 0.5, (others - other_mean) / (len(others) - 1) ** 0.5
    shared = torch.linalg.svdvals(x @ y.T).sum()
    distance = (mean - other_mean).square().sum() + x.square().sum() + y.square().sum() - 2 * shared
    return max(float(distance), 0.0)


def kernel_inception_distance(
    features: Tensor, others: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID (arXiv 1801.01401): squared MMD with the kernel (x·y / F + 1)³, unbiased; may come out below zero.

    Args:
        features, others: `[N, F]`; their N may differ.
        subsets: number of random subsets, sampled without replacement, over which it is averaged.
        subset_size: images per subset and set; at most all there are.
        seed: of the subsets.

    Returns:
        The mean and the standard deviation over the subsets.

    Raises:
        ValueError: for fewer than two images, unequal F, or no subset.
    """
    _check_features(features, others)
    size = min(subset_size, len(features), len(others))
    if subsets < 1 or size < 2:
        raise ValueError(f"`subsets` must be at least 1 and `subset_size` 2, got {subsets} and {subset_size}")
    generator = torch.Generator().manual_seed(seed)

    def sample(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)].double()

    values = torch.stack([_squared_mmd(sample(features), sample(others)) for _ in range(subsets)])
    return float(values.mean()), float(values.std(correction=0))


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal_mean(a: Tensor) -> Tensor:
        values = kernel(a, a)
        return (values.sum() - values.trace()) / (len(a) * (len(a) - 1))

    return off_diagonal_mean(x) + off_diagonal_mean(y) - 2 * kernel(x, y).mean()
