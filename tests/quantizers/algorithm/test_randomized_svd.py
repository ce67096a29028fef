"""Matrices of low rank taken apart: the change that an adapter makes to a weight, as far as rounding shows it."""

import pytest
import torch

from diffusers_sana.quantizers.svdquant.algorithm.randomized_svd import low_rank_factors
from tests.numerics import relative_error


def product(rank, shape=(96, 160), decades=1.0):
    """A change like an adapter's, whose directions differ in strength by up to that many powers of ten."""
    return torch.randn(shape[0], rank) @ (torch.logspace(0, -decades, rank)[:, None] * torch.randn(rank, shape[1]))


@pytest.mark.parametrize("rank", [1, 3, 16, 40])
def test_rank_and_matrix_are_found_again(rank):
    matrix = product(rank)
    up, down = low_rank_factors(matrix)
    assert up.shape == (96, rank)
    assert down.shape == (rank, 160)
    assert relative_error(up @ down, matrix) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_a_rounded_matrix_is_told_from_its_rounding(dtype, scale):
    exact = product(8, shape=(256, 320)) * scale
    exact[torch.randperm(256)[:10]] *= 8  # rounding errors are larger there
    matrix = exact.to(dtype)
    up, down = low_rank_factors(matrix)
    assert 4 <= up.shape[1] <= 12
    assert relative_error(up @ down, exact) < 1.1 * relative_error(matrix, exact)


def test_further_noise_can_be_told():
    matrix = product(6)
    noise = torch.randn_like(matrix) * 1e-3
    assert low_rank_factors(matrix + noise) is None
    up, down = low_rank_factors(matrix + noise, noise.norm().item())
    assert up.shape[1] == 6
    assert relative_error(up @ down, matrix) < relative_error(matrix + noise, matrix)


def test_high_rank_and_nothing():
    assert low_rank_factors(torch.randn(96, 160)) is None
    assert low_rank_factors(product(49)) is None
    assert low_rank_factors(torch.ones(1, 5)) is None
    up, down = low_rank_factors(torch.zeros(96, 160))
    assert (up.shape, down.shape) == ((96, 0), (0, 160))
