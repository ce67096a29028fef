"""Adversarial objectives: on images, for the last autoencoder phase, and on latents, for SANA-Sprint.

Images: a patch discriminator as in latent diffusion (arXiv 2112.10752, appendix G). Latents: LADD (arXiv 2403.12015),
where small heads read the features of a frozen teacher.

Legend: B batch, H/W height and width, h/w grid of patches or of image tokens, C latent channels, D inner width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from diffusers_sana.schedulers.trigflow import flow_to_trigflow
from diffusers_sana.training.objectives.flow_matching import ConditionedTransformer


class PatchDiscriminator(nn.Module):
    """Classifies overlapping patches (PatchGAN, arXiv 1611.07004): images `[B, 3, H, W]` to logits `[B, 1, h, w]`.

    Group norm stands where the original has batch norm, so that real and generated batches do not mix statistics and
    small batches do not hurt.

    Args:
        channels: width of the first layer; doubles with each further layer up to eight times.
        num_layers: number of layers that halve the resolution; 3 see patches of 70 pixels.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for index in range(1, num_layers + 1):
            in_width, width = width, channels * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            layers += [
                nn.Conv2d(in_width, width, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` to logits `[B, 1, h, w]`, one per patch."""
        return self.layers(images)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss: real patches should score above 1, generated ones below -1."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Generated patches should score high."""
    return -fake_logits.mean()


PAPER_BLOCKS, PAPER_DEPTH = (2, 8, 14, 19), 20


def default_blocks(num_layers: int) -> tuple[int, ...]:
    """The blocks whose outputs the heads read: the paper's 2, 8, 14 and 19 of 20, or those at equal relative depth."""
    return tuple(sorted({round(block * (num_layers - 1) / (PAPER_DEPTH - 1)) for block in PAPER_BLOCKS}))


class DiscriminatorHeads(nn.Module):
    """One small convolutional head for each of these blocks: features to logits `[B, 1, h, w]`.

    Args:
        width: D of the teacher.
        count: number of blocks.
        channels: width inside the heads, a multiple of 8.
    """

    def __init__(self, width: int, count: int, channels: int = 128):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, width),  # the residual stream grows from block to block
                spectral_norm(nn.Conv2d(width, channels, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(channels, channels, 3, padding=1)),
                nn.GroupNorm(8, channels),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(channels, 1, 1)),
            )
            for _ in range(count)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits `[B, count * h * w]` of features `[B, D, h, w]`, one of each block."""
        logits = [head(feature).flatten(1) for head, feature in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1).float()


def teacher_features(
    teacher: ConditionedTransformer,
    noisy: Tensor,
    angles: Tensor,
    prompt: tuple[Tensor, Tensor],
    blocks: Sequence[int],
) -> list[Tensor]:
    """Outputs `[B, D, h, w]` of the teacher's `blocks`; gradients flow to `noisy`.

    Args:
        teacher: frozen.
        noisy: x_t of TrigFlow, `[B, C, h, w]`.
        angles: `[B]`.
        prompt: vectors `[B, L, D]` and mask `[B, L]`.
        blocks: numbers of blocks, ascending.
    """
    patch = teacher.transformer.config.patch_size
    height, width = noisy.shape[-2] // patch, noisy.shape[-1] // patch
    with _outputs(teacher.transformer.transformer_blocks, blocks) as outputs:
        flow_to_trigflow(lambda latents, sigmas: teacher(latents, sigmas, prompt), noisy, angles)
    # Contiguous: PyTorch 2.13 crashes in the backward of a group norm over channels-last input without a gradient.
    return [output.transpose(1, 2).unflatten(-1, (height, width)).contiguous() for output in outputs]


@contextmanager
def _outputs(layers: nn.ModuleList, chosen: Sequence[int]) -> Iterator[list[Tensor]]:
    """A list to which the chosen layers add their outputs, while the context lasts."""
    outputs: list[Tensor] = []
    handles = [
        layers[index].register_forward_hook(lambda layer, arguments, output: outputs.append(output))
        for index in chosen
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
