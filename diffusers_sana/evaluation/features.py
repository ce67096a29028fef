"""Networks whose features FID and KID compare. Any function from images to features works.

Legend: N images, H/W height and width, F features.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffusers_sana.evaluation.optional import require


Features = Callable[[Tensor], Tensor]
"""Images `[N, 3, H, W]` in [0, 1] to features `[N, F]`."""


def make_inception(weights: str | Path | None = None, device: str = "cpu") -> Features:
    """The 2048 features of published FID and KID figures: TensorFlow's Inception-v3, by `torch-fidelity`.

    Args:
        weights: `pt_inception-2015-12-05-6726825d.pth` of torch-fidelity's releases; None: it downloads that file.
        device: where it runs.

    Raises:
        ValueError: torch-fidelity, or torchvision, which it needs, is not installed.
    """
    name = "torch_fidelity.feature_extractor_inceptionv3"
    module = require(name, "`features='inception'`", "choose other features")
    path = None if weights is None else str(weights)
    network = module.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)
    network = network.to(device).eval()

    def features(images: Tensor) -> Tensor:
        return network((images * 255).round().to(device, torch.uint8))[0]

    return features
