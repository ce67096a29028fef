"""Flow matching as Sana trains it (arXiv 2410.10629, section 3.2; logit-normal times from arXiv 2403.03206).

Legend: B batch, C latent channels, h/w latent height and width. sigma in (0, 1) is the share of noise:
x_sigma = (1 - sigma) x_0 + sigma eps, and the network predicts the velocity eps - x_0. It is told
t = 1000 sigma, the same number that the schedulers feed it, with sigma already shifted.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


TRAIN_TIMESTEPS = 1000


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise shares towards noise: shift sigma / (1 + (shift - 1) sigma)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sample_sigmas(
    count: int, shift: float, mean: float = 0.0, std: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Logit-normal noise shares `[count]`: shift(sigmoid(N(mean, std^2)))."""
    return shift_sigmas(torch.sigmoid(mean + std * torch.randn(count, device=device)), shift)


def interpolate(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_sigma for latents and noise `[B, C, h, w]` and sigmas `[B]`."""
    sigmas = sigmas.view(-1, 1, 1, 1)
    return (1 - sigmas) * latents + sigmas * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the network is to predict, the same at every sigma: d x_sigma / d sigma."""
    return noise - latents


@torch.no_grad()
def sample_euler(
    predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, num_steps: int = 20, shift: float = 3.0
) -> Tensor:
    """Follow the velocity from noise to latents in Euler steps.

    Args:
        predict: from x_sigma `[B, C, h, w]` and sigmas `[B]` to the velocity.
        noise: x_1 `[B, C, h, w]`.
        num_steps: calls of `predict`.
        shift: shift of the evenly spaced grid of sigmas.
    """
    sigmas = shift_sigmas(torch.linspace(1, 0, num_steps + 1, device=noise.device), shift)
    sample = noise
    for sigma, next_sigma in pairwise(sigmas):
        sample = sample + (next_sigma - sigma) * predict(sample, sigma.expand(len(sample)))
    return sample
