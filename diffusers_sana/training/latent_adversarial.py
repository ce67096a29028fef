"""Latent adversarial distillation (LADD, arXiv 2403.12015) as SANA-Sprint uses it: a frozen teacher sees, heads judge.

Legend: B batch, N image tokens, h/w token grid, D inner width, C latent channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from diffusers_sana.training.conditioned_transformer import ConditionedTransformer
from diffusers_sana.training.trigflow import flow_to_trigflow


PAPER_BLOCKS, PAPER_DEPTH = (2, 8, 14, 19), 20


def default_blocks(num_layers: int) -> tuple[int, ...]:
    """The blocks whose outputs are judged: the paper's 2, 8, 14 and 19 of 20, or those at the same relative depth."""
    return tuple(sorted({round(block * (num_layers - 1) / (PAPER_DEPTH - 1)) for block in PAPER_BLOCKS}))


class DiscriminatorHeads(nn.Module):
    """One small convolutional head for each judged block: features to logits `[B, 1, h, w]`.

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
