"""The discriminator of the last autoencoder phase, as in latent diffusion (arXiv 2112.10752, appendix G).

Legend: B batch, H/W height and width, h/w the grid of patches.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches (PatchGAN, arXiv 1611.07004): images `[B, 3, H, W]` to logits `[B, 1, h, w]`.

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
        return self.layers(images)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss: real patches should score above 1, generated ones below -1."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Generated patches should score high."""
    return -fake_logits.mean()
