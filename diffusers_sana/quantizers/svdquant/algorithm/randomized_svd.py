"""Low-rank approximation of a matrix, as such or for given inputs, by a randomized range finder.

Legend: N rows, K columns, r rank, c columns of the working basis, a few more than r.
"""

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import nonzero


OVERSAMPLING = 8  # columns of the basis beyond the rank
POWER_ITERATIONS = 2
WARM_POWER_ITERATIONS = {"plain": 0, "weighted": 1}  # of a search that starts near the result
FIRST_COLUMNS = 16  # of the basis in `low_rank_factors`, which then doubles
ACCUMULATION_ERROR = 2**-18  # relative, of an fp32 product over a few hundred terms


def randomized_svd(matrix: Tensor, rank: int, seed: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A nearly optimal approximation of rank r: `up` `[N, r]` and `down` `[r, K]` with orthonormal rows.

    Randomized range finder with power iterations (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4). The same
    seed gives the same bits on one device.

    Args:
        matrix: `[N, K]`, fp32.
        rank: r.
        seed: of the search for the directions.
        start: `down` of a similar matrix, `[<= r, K]`: the search starts there, which saves most of its time.
    """
    if rank == 0:
        return matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0, matrix.shape[1])
    probe = _probe(matrix, rank, seed, start)
    basis = _orthonormal(matrix @ probe)
    for _ in range(POWER_ITERATIONS if start is None else WARM_POWER_ITERATIONS["plain"]):
        basis = _orthonormal(matrix.t() @ basis)
        basis = _orthonormal(matrix @ basis)
    projected = basis.t() @ matrix
    values, vectors = _principal(projected)
    values, vectors = values[:rank], vectors[:, :rank]
    return basis @ (vectors * values), (vectors / nonzero(values)).t() @ projected


def weighted_svd(
    matrix: Tensor, rank: int, seed: int, covariance: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A nearly optimal approximation for inputs of a given covariance: `up` `[N, r]`, `down` `[r, K]` with unit rows.

    With C = E[x x^T] and L L^T = C, the mean error of the output is

        E |(matrix - up @ down) x|^2 = ||(matrix - up @ down) L||_F^2

    which is minimal for `up` from the largest left singular vectors of matrix @ L, those of matrix @ C @ matrix^T, and
    `down = up^T @ matrix`. So C need not be inverted. The approximation is a projection: for no input is the error
    larger than the output of `matrix` itself. The same seed gives the same bits, as in `randomized_svd`.

    Args:
        matrix: `[N, K]`, fp32.
        rank: r.
        seed: of the search for the directions.
        covariance: `[K, K]`, fp32, up to a constant factor.
        start: as in `randomized_svd`.
    """
    probe = _probe(matrix, rank, seed, start)
    basis = _orthonormal(matrix @ (covariance @ probe))
    for _ in range(POWER_ITERATIONS if start is None else WARM_POWER_ITERATIONS["weighted"]):
        basis = _orthonormal(matrix @ (covariance @ (matrix.t() @ basis)))
    projected = basis.t() @ matrix
    _, vectors = torch.linalg.eigh(_in_fp64(projected @ covariance @ projected.t()))
    up = basis @ vectors.flip(1)[:, :rank].to(matrix)
    down = up.t() @ matrix
    lengths = down.norm(dim=1)
    return up * lengths, down / nonzero(lengths)[:, None]


def _probe(matrix: Tensor, rank: int, seed: int, start: Tensor | None) -> Tensor:
    """The first directions of a search, `[K, c]`."""
    columns = min(rank + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix)
    if start is not None:
        probe[:, : len(start)] = start.t()
    return probe


def low_rank_factors(matrix: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor] | None:
    """A low-rank matrix as `up` `[N, r]` and `down` `[r, K]`, fp64; None if its rank is above half the full rank.

    The rank is the number of singular values above the rounding errors. Those of a random matrix with the Frobenius
    norm e reach e (1 / sqrt(N) + 1 / sqrt(K)). The part that is dropped is never larger than the rounding errors.

    Args:
        matrix: `[N, K]`, finite, with rounding errors of its dtype.
        noise: Frobenius norm of further rounding errors.
    """
    exact = matrix.double()
    info, most = torch.finfo(matrix.dtype), min(matrix.shape)
    noise += exact.norm().item() * max(info.eps / 2, ACCUMULATION_ERROR)
    noise += info.smallest_normal * info.eps * matrix.numel() ** 0.5  # below the normal numbers errors are absolute
    generator = torch.Generator().manual_seed(0)
    basis = exact.new_zeros(len(exact), 0)
    done = False
    while not done and basis.shape[1] < most:
        columns = min(max(basis.shape[1], FIRST_COLUMNS), most - basis.shape[1])
        probe = torch.randn(exact.shape[1], columns, generator=generator, dtype=torch.float64).to(exact.device)
        sample = exact @ probe
        missing = sample - basis @ (basis.t() @ sample)
        done = bool(missing.norm() <= noise * columns**0.5)  # the Frobenius norm of what the basis lacks, as expected
        basis = torch.linalg.qr(torch.cat([basis, missing], dim=1)).Q
    projected = basis.t() @ exact
    values, vectors = _principal(projected)
    # Squared norm of what the first r directions leave out, for r = 0, 1, ...
    left_out = exact.norm().square() - torch.nn.functional.pad(values.square().cumsum(0), (1, 0))
    edge = 2 * noise * sum(side**-0.5 for side in matrix.shape)
    rank = max(int((left_out > noise**2).sum()), int((values > edge).sum()))
    if rank > most // 2:
        return None
    vectors, values = vectors[:, :rank], values[:rank]
    return basis @ (vectors * values), (vectors / nonzero(values)).t() @ projected


def _orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns, `[N, c]` with small c; zeros for linearly dependent columns."""
    values, vectors = _principal(matrix.t())
    dependent = values <= values[0] * torch.finfo(matrix.dtype).eps
    return matrix @ (vectors / nonzero(values)).masked_fill(dependent, 0.0)


def _principal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and left singular vectors of `[c, K]` with small c.

    From the c x c products of rows in fp64: far cheaper than a decomposition of the matrix itself, and as exact as
    fp32 can represent.
    """
    wide = _in_fp64(matrix)
    values, vectors = torch.linalg.eigh(wide @ wide.t())
    return values.flip(0).clamp(min=0).sqrt().to(matrix), vectors.flip(1).to(matrix)


def _in_fp64(matrix: Tensor) -> Tensor:
    """In fp64; on the CPU where the device has no fp64, such as Apple's GPUs."""
    return matrix.cpu().double() if matrix.device.type == "mps" else matrix.double()
