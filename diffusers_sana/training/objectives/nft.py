"""DiffusionNFT: learning from rewards on the forward process (arXiv 2509.16117).

Images of an old policy are compared by a reward. Each is a sample of a better policy with a probability r, and of a
worse one with 1 - r. Both policies are implicit in the one that trains, v: the better one is
(1 - beta) v_old + beta v, the worse one (1 + beta) v_old - beta v. Both learn by flow matching, on the images alone:
no likelihoods, no trajectories, any solver.

Legend: B images of P prompts, G images each, C latent channels, h/w latent height and width.
"""

import torch
from torch import Tensor


SMALLEST = 1e-5  # below which distances of clean latents are not divided by


def optimalities(rewards: Tensor, group_size: int, clip: float = 5.0, std: Tensor | None = None) -> Tensor:
    """The probabilities r `[B]` that images are samples of the better policy: 1/2 + clip((R - mean) / std) / 2.

    Args:
        rewards: `[B]`, the G images of a prompt one after the other.
        group_size: G. Means are those of groups.
        clip: advantages of this many standard deviations have the probabilities 0 and 1.
        std: what advantages are divided by, a scalar; None: the standard deviation of each group.
    """
    groups = rewards.float().view(-1, group_size)
    spread = groups.std(1, keepdim=True, correction=0) if std is None else std
    advantages = (groups - groups.mean(1, keepdim=True)) / (spread + 1e-4)  # equal rewards teach nothing
    return (0.5 + 0.5 * (advantages / clip).clamp(-1, 1)).flatten()


def most_contrastive(rewards: Tensor, group_size: int, kept: int) -> Tensor:
    """Indices `[P kept]` of the `kept` / 2 best and worst of each group, in their order.

    `rewards` and `group_size` as in `optimalities`.
    """
    order = rewards.view(-1, group_size).argsort(dim=1, stable=True)
    chosen = torch.cat([order[:, : kept // 2], order[:, group_size - kept // 2 :]], dim=1).sort(dim=1).values
    return (chosen + group_size * torch.arange(len(chosen), device=chosen.device)[:, None]).flatten()


def nft_losses(
    velocity: Tensor,
    old_velocity: Tensor,
    noisy: Tensor,
    latents: Tensor,
    sigmas: Tensor,
    optimality: Tensor,
    beta: float = 1.0,
) -> Tensor:
    """The loss of each image `[B]`.

    The squared errors of both implicit policies, of their clean latents x_sigma - sigma v, each divided by its mean
    absolute error (without gradient), which makes all noise levels weigh alike; over beta, as in the authors' code.

    Args:
        velocity: of the policy that trains, `[B, C, h, w]`.
        old_velocity: of the one that has sampled the images.
        noisy: x_sigma, which both have seen.
        latents: the images.
        sigmas: noise levels `[B]`.
        optimality: r `[B]`.
        beta: how far the implicit policies are from the old one.
    """
    velocity, old_velocity = velocity.float(), old_velocity.float()

    def errors(implicit: Tensor) -> Tensor:
        difference = noisy - sigmas.view(-1, 1, 1, 1) * implicit - latents
        scale = difference.detach().abs().mean((1, 2, 3)).clamp_min(SMALLEST)
        return difference.square().mean((1, 2, 3)) / scale

    better = errors((1 - beta) * old_velocity + beta * velocity)
    worse = errors((1 + beta) * old_velocity - beta * velocity)
    return (optimality * better + (1 - optimality) * worse) / beta


def old_decay(step: int, rate: float = 0.001, largest: float = 0.5) -> float:
    """The decay of the old policy's EMA after `step`, counted from 0: at first it is the policy that trains."""
    return min(rate * step, largest)
