"""TrigFlow, the time of SANA-Sprint, beside the flow matching that Sana is trained in (arXiv 2503.09641, section 3.1).

TrigFlow mixes `x_t = cos(t) z + sin(t) noise`, the angle t from 0 to π/2, and predicts `F = dx_t / dt`. Flow matching
mixes `(1 - σ) z + σ noise` and predicts `noise - z`. At `σ = sin(t) / (sin(t) + cos(t))` the two mixtures differ by a
factor only, and so the prediction of one is that of the other: nothing is lost and nothing is trained.

All latents are in units of their standard deviation. `sigma_data`, which TrigFlow multiplies them with, is left for
where it does not cancel: the distribution of the training angles, and the constant of the tangent's normalization.

Legend: B batch, C latent channels, h/w latent height and width.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


MAX_ANGLE = math.pi / 2  # noise alone
# From noise to image in so many steps: the angles before each step, and 0 (arXiv 2503.09641, section 4).
STEP_ANGLES = {1: (MAX_ANGLE, 0.0), 2: (MAX_ANGLE, 1.3, 0.0), 4: (MAX_ANGLE, 1.3, 1.1, 0.6, 0.0)}


def angles_to_sigmas(angles: Tensor) -> Tensor:
    """The noise levels σ of flow matching at the same ratio of noise to image, `[B]`."""
    return angles.sin() / (angles.sin() + angles.cos())


def sample_angles(
    count: int, mean: float, std: float, sigma_data: float = 0.5, device: torch.device | str = "cpu"
) -> Tensor:
    """Training angles `[count]`, arctan(exp(N(mean, std²)) / sigma_data) (sCM, arXiv 2410.11081)."""
    return torch.atan(torch.exp(mean + std * torch.randn(count, device=device)) / sigma_data)


def mix(latents: Tensor, noise: Tensor, angles: Tensor) -> Tensor:
    """x_t of latents and noise `[B, C, h, w]` at angles `[B]`."""
    angles = angles.view(-1, 1, 1, 1)
    return angles.cos() * latents + angles.sin() * noise


def flow_to_trigflow(predict: Callable[[Tensor, Tensor], Tensor], noisy: Tensor, angles: Tensor) -> Tensor:
    """The prediction F `[B, C, h, w]` of TrigFlow by a network of flow matching.

    Args:
        predict: from the mixture of flow matching `[B, C, h, w]` and its noise levels `[B]` to `noise - latents`.
        noisy: x_t, `[B, C, h, w]`.
        angles: `[B]`.
    """
    sigmas = angles_to_sigmas(angles)
    sigma = sigmas.view(-1, 1, 1, 1)
    norm = torch.sqrt(sigma**2 + (1 - sigma) ** 2)
    scaled = noisy * norm
    return ((1 - 2 * sigma) * scaled + (1 - 2 * sigma + 2 * sigma**2) * predict(scaled, sigmas)) / norm


def clean_latents(noisy: Tensor, prediction: Tensor, angles: Tensor) -> Tensor:
    """The latents `[B, C, h, w]` that a prediction F of x_t points to: what a consistency model outputs."""
    angles = angles.view(-1, 1, 1, 1)
    return angles.cos() * noisy - angles.sin() * prediction


@torch.no_grad()
def sample_consistency(
    predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, angles: Sequence[float], generator: torch.Generator
) -> Tensor:
    """From noise to latents in a few steps: to the image, and back into new noise up to the next angle.

    Args:
        predict: from x_t `[B, C, h, w]` and angles `[B]` to F.
        noise: `[B, C, h, w]`, of standard deviation 1.
        angles: descending from π/2 to 0, one more than there are steps; see `STEP_ANGLES`.
        generator: of the new noise, on the CPU.
    """
    latents = noise
    for index, angle in enumerate(angles[:-1]):
        if index > 0:
            new = torch.randn(noise.shape, generator=generator).to(noise)
            latents = mix(latents, new, torch.tensor([angle], device=noise.device))
        now = torch.full([len(noise)], angle, device=noise.device)
        latents = clean_latents(latents, predict(latents, now), now)
    return latents
