"""Similarity of pairs of images: PSNR, SSIM, LPIPS.

Legend: N pairs, H/W height and width. Images are `[N, 3, H, W]` in [0, 1].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_sana.evaluation.optional import require


def _check_pairs(images: Tensor, targets: Tensor) -> None:
    if images.shape != targets.shape:
        raise ValueError(
            f"`targets` must have the shape of `images`, {tuple(images.shape)}, got {tuple(targets.shape)}; "
            "generate both at one size"
        )


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, `[N]` in dB; infinite for equal images.

    Raises:
        ValueError: for unequal shapes.
    """
    _check_pairs(images, targets)
    return -10 * (images.double() - targets.double()).square().mean((1, 2, 3)).log10()


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each pair, `[N]`, at most 1, by scikit-image.

    Raises:
        ValueError: for unequal shapes, or if scikit-image is not installed.
    """
    _check_pairs(images, targets)
    metrics = require("skimage.metrics", "`ssim`", "leave it out")
    pairs = zip(images.double().cpu().numpy(), targets.double().cpu().numpy(), strict=True)
    return torch.tensor([metrics.structural_similarity(a, b, data_range=1.0, channel_axis=0) for a, b in pairs])


def make_lpips(net: str = "alex", device: str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """A function from two sets of images to their LPIPS distances `[N]` (arXiv 1801.03924), by the `lpips` package.

    Args:
        net: the features: "alex" (the default of the paper's evaluations), "vgg" or "squeeze".
        device: where it runs.

    Raises:
        ValueError: `lpips`, or torchvision, which it needs, is not installed.
    """
    network = require("lpips", "`lpips`", "leave it out").LPIPS(net=net, verbose=False).to(device).eval()

    @torch.no_grad()
    def distances(images: Tensor, targets: Tensor) -> Tensor:
        _check_pairs(images, targets)
        pairs = zip(images.float().split(8), targets.float().split(8), strict=True)
        return torch.cat([network(a.to(device), b.to(device), normalize=True).flatten().cpu() for a, b in pairs])

    return distances
