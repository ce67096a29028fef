"""Flow matching as Sana trains it (arXiv 2410.10629, section 3.2; logit-normal times from arXiv 2403.03206).

Legend: B batch, C latent channels, h/w latent height and width. Where latents are `[B, C, h, w]`, those of videos,
`[B, C, T, h, w]` with T latent frames, will do as well. sigma in [0, 1) is the noise level:
x_sigma = (1 - sigma) x_0 + sigma eps, and the network predicts the velocity eps - x_0. As in the authors' code
(NVlabs/Sana, `diffusion/model/respace.py` and `gaussian_diffusion.py`), sigma is one of 1000 levels 0, 0.001, ...,
0.999, then shifted, and the network is given t = floor(1000 sigma): whole numbers, as Flow-DPM-Solver feeds it.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffusers_sana.prompts.encoding import PromptTokens, drop_prompts, encode_tokens


TRAIN_TIMESTEPS = 1000


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels towards noise: shift sigma / (1 + (shift - 1) sigma)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sample_sigmas(
    count: int, shift: float, mean: float = 0.0, std: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Logit-normal noise levels `[count]`: shift(floor(1000 sigmoid(N(mean, std^2))) / 1000)."""
    levels = torch.sigmoid(mean + std * torch.randn(count, device=device)) * TRAIN_TIMESTEPS
    return shift_sigmas(levels.floor().clamp_max(TRAIN_TIMESTEPS - 1) / TRAIN_TIMESTEPS, shift)


def timesteps_of(sigmas: Tensor) -> Tensor:
    """The timesteps that the network is given for sigmas: floor(1000 sigma), in floating point."""
    # 1000 times the fp32 number next to 0.007 may lie below 7, by at most 6e-5.
    return (sigmas * TRAIN_TIMESTEPS + 1e-4).floor()


def interpolate(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_sigma for latents and noise `[B, C, h, w]` and sigmas `[B]`."""
    sigmas = sigmas.view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigmas) * latents + sigmas * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the network is to predict, the same at every sigma: d x_sigma / d sigma."""
    return noise - latents


def noisy_batch(latents: Tensor, shift: float, mean: float = 0.0, std: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents `[B, C, h, w]`, their sigmas `[B]` and the velocities to predict, for clean latents.

    `shift`, `mean` and `std` as in `sample_sigmas`.
    """
    noise = torch.randn_like(latents)
    sigmas = sample_sigmas(len(latents), shift, mean, std, latents.device)
    return interpolate(latents, noise, sigmas), sigmas, velocity_target(latents, noise)


def level_weights(sigmas: Tensor, weighting: str = "none", snr_gamma: float = 5.0) -> Tensor:
    """Weights of the squared error of velocities at noise levels sigma `[B]`.

    Args:
        sigmas: noise levels in [0, 1).
        weighting: "none": 1. "min_snr" (arXiv 2303.09556): min(SNR, `snr_gamma`) times the squared error of x_0, where
            SNR = ((1 - sigma) / sigma)^2. Since x_0 = x_sigma - sigma v, that is min((1 - sigma)^2, gamma sigma^2).
            "cosmap" (arXiv 2403.03206): 2 / (pi (1 - 2 sigma + 2 sigma^2)), the ratio of a cosine schedule's density
            to a uniform one.
        snr_gamma: of "min_snr".
    """
    if weighting == "min_snr":
        return torch.minimum((1 - sigmas).square(), snr_gamma * sigmas.square())
    if weighting == "cosmap":
        return 2 / (torch.pi * (1 - 2 * sigmas + 2 * sigmas.square()))
    return torch.ones_like(sigmas)


def velocity_errors(
    velocity: Tensor, target: Tensor, sigmas: Tensor, weighting: str = "none", snr_gamma: float = 5.0
) -> Tensor:
    """Mean squared error of each image's velocity `[B, C, h, w]`, weighted by its noise level: `[B]`.

    `sigmas`, `weighting` and `snr_gamma` as in `level_weights`.
    """
    errors = F.mse_loss(velocity.float(), target, reduction="none").mean(tuple(range(1, target.ndim)))
    return level_weights(sigmas, weighting, snr_gamma) * errors


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


@torch.no_grad()
def sample_guided(
    predict: Callable[..., Tensor],
    noise: Tensor,
    guidance_scale: float,
    num_steps: int = 20,
    shift: float = 3.0,
) -> Tensor:
    """`sample_euler` with classifier-free guidance: v = v_empty + guidance_scale (v_conditional - v_empty).

    Args:
        predict: from x_sigma `[2 B, C, h, w]`, sigmas `[2 B]` and `dropped`, a mask `[2 B]` that is true in the second
            half, of images without their condition, to the velocity.
        noise: x_1 `[B, C, h, w]`.
        guidance_scale: 1 is without guidance.
        num_steps, shift: as in `sample_euler`.
    """
    dropped = torch.arange(2 * len(noise), device=noise.device) >= len(noise)

    def guided(latents: Tensor, sigmas: Tensor) -> Tensor:
        velocity = predict(torch.cat([latents, latents]), sigmas.repeat(2), dropped=dropped).float()
        conditional, empty = velocity.chunk(2)
        return empty + guidance_scale * (conditional - empty)

    return sample_euler(guided, noise, num_steps, shift)


class ConditionedTransformer(nn.Module):
    """One module for what trains, so that DDP and FSDP see one forward per step.

    Args:
        transformer: a SanaTransformer2DModel or SanaVideoTransformer3DModel.
        text_encoder: a Gemma2Model that trains too; None when the vectors of a frozen encoder are given to `forward`.
        dense_timesteps: tell the transformer 1000 sigma rather than floor(1000 sigma). For the teacher of a
            distillation in continuous time (SANA-Sprint, arXiv 2503.09641), which is asked at all times in between.
    """

    def __init__(
        self,
        transformer: ModelMixin,
        text_encoder: PreTrainedModel | None = None,
        dense_timesteps: bool = False,
    ):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.dense_timesteps = dense_timesteps

    def forward(
        self,
        noisy_latents: Tensor,
        sigmas: Tensor,
        prompt: PromptTokens | tuple[Tensor, Tensor],
        dropped: Tensor | None = None,
    ) -> Tensor:
        """The predicted velocity `[B, C, h, w]`.

        Args:
            noisy_latents: `[B, C, h, w]`.
            sigmas: noise levels `[B]`.
            prompt: tokens with a text encoder; without one vectors `[B, L, D]` and mask `[B, L]`.
            dropped: `[B]`, true where the prompt is to be replaced by the empty one.
        """
        embeds, mask = self.text_of(prompt, dropped)
        timestep = self.timestep_of(sigmas)
        return self.transformer(noisy_latents, embeds, timestep, encoder_attention_mask=mask, return_dict=False)[0]

    def text_of(
        self, prompt: PromptTokens | tuple[Tensor, Tensor], dropped: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Text vectors `[B, L, D]` and their mask `[B, L]`; arguments as in `forward`."""
        if self.text_encoder is not None:
            embeds, mask = encode_tokens(self.text_encoder, cast(PromptTokens, prompt))
        else:
            embeds, mask = cast(tuple[Tensor, Tensor], prompt)
        return embeds, mask if dropped is None else drop_prompts(mask, dropped)

    def timestep_of(self, sigmas: Tensor) -> Tensor:
        """What the transformer is told for noise levels `[B]`."""
        timesteps = sigmas * TRAIN_TIMESTEPS if self.dense_timesteps else timesteps_of(sigmas)
        return timesteps * self.transformer.config.get("timestep_scale", 1.0)  # SANA-Video has no such field
