"""A perceptual loss that needs no download, and LPIPS where its package is installed.

Legend: B batch, C channels, H/W height and width.

LPIPS (arXiv 1801.03924) compares unit-normalized feature maps of a trained classifier. The structure of such a network
already carries most of the effect: random weights serve as well for outputs with spatial structure (arXiv 2103.10571,
"Generic Perceptual Loss for Modeling Structured Output Dependencies"). So the default here is a small VGG-shaped
network with fixed random weights. Any module that returns a list of feature maps, such as a trained VGG-16 cut at its
ReLUs, can take its place.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RandomFeatures(nn.Module):
    """VGG-shaped network with seeded orthogonal weights; returns one feature map per stage.

    Args:
        channels: width of each stage; every stage halves the resolution of the one before.
        seed: seed of the weights. The same seed gives the same loss on every machine and in every run.
    """

    def __init__(self, channels: Sequence[int] = (16, 32, 64, 128), seed: int = 0):
        super().__init__()
        self.stages = nn.ModuleList()
        in_channels = 3
        for width in channels:
            layers = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.ReLU()]
            self.stages.append(nn.Sequential(*layers))
            in_channels = width
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # sqrt(2) keeps the variance through the ReLUs
                nn.init.orthogonal_(module.weight, gain=2**0.5, generator=generator)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `[B, 3, H, W]` in [-1, 1] to feature maps `[B, C_i, H / 2^i, W / 2^i]`."""
        features = []
        hidden_states = images
        for index, stage in enumerate(self.stages):
            if index > 0:
                hidden_states = F.avg_pool2d(hidden_states, 2)
            hidden_states = stage(hidden_states)
            features.append(hidden_states)
        return features


class PerceptualLoss(nn.Module):
    """Mean over layers and places of the squared distance between unit-length feature vectors (LPIPS, no weights).

    Args:
        network: module from images `[B, 3, H, W]` in [-1, 1] to a list of feature maps. Default: `RandomFeatures()`.
            It becomes a part of the loss: it is frozen and put into evaluation mode.
        crop_size: compare one random square of this side instead of whole images, the same for the batch; saves
            time on a CPU. 0 compares whole images.
        distance: used in the place of all this: a module from images and targets to their distances, such as LPIPS.
            It is frozen, too.
    """

    def __init__(
        self, network: nn.Module | None = None, crop_size: int = 0, distance: Callable[..., Tensor] | None = None
    ):
        super().__init__()
        self.network = None if distance else (network or RandomFeatures())
        self.distance, self.crop_size = distance, crop_size
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distance of `images` to `targets`, both `[B, 3, H, W]`; a scalar."""
        height, width = targets.shape[-2:]
        if 0 < self.crop_size < min(height, width):
            top = int(torch.randint(height - self.crop_size + 1, ()))
            left = int(torch.randint(width - self.crop_size + 1, ()))
            window = (..., slice(top, top + self.crop_size), slice(left, left + self.crop_size))
            images, targets = images[window], targets[window]
        if self.network is None:
            assert self.distance is not None
            return self.distance(images, targets).mean()
        with torch.no_grad():
            expected = self.network(targets)
        distances = [
            (_unit_length(feature) - _unit_length(target)).square().sum(dim=1).mean()
            for feature, target in zip(self.network(images), expected, strict=True)
        ]
        return torch.stack(distances).mean()


def make_perceptual(kind: str, network: nn.Module | None = None, crop_size: int = 0) -> PerceptualLoss:
    """The perceptual loss of a recipe.

    Args:
        kind: "random", or "lpips": the `lpips` package's trained distance on VGG-16 (arXiv 1801.03924), whose weights
            torchvision downloads once.
        network: features to be used whatever the kind.
        crop_size: as in `PerceptualLoss`.

    Raises:
        ValueError: `lpips`, or torchvision, which it needs, is not installed.
    """
    if kind == "random" or network is not None:
        return PerceptualLoss(network, crop_size)
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise ValueError(
            f"`perceptual` 'lpips' needs packages ({error}). `pip install lpips torchvision`, or use 'random'."
        ) from error
    return PerceptualLoss(crop_size=crop_size, distance=LPIPS(net="vgg", verbose=False))


def _unit_length(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1, eps=1e-6)
