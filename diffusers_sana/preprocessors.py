"""Control images from images: Sobel edges, and what the detectors of `controlnet_aux` find where it is installed.

The authors trained their ControlNets on HED maps (arXiv 1504.06375).
"""

import importlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.images import sobel_edges, to_pixels


WEIGHTS = "lllyasviel/Annotators"  # the repository of all detectors of controlnet_aux

# Name -> class of controlnet_aux, whether it has weights, and how it is called.
DETECTORS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "hed": ("HEDdetector", True, {}),
    "hed_scribble": ("HEDdetector", True, {"scribble": True}),
    "pidinet": ("PidiNetDetector", True, {}),
    "canny": ("CannyDetector", False, {}),
    "lineart": ("LineartDetector", True, {}),
    "lineart_anime": ("LineartAnimeDetector", True, {}),
    "mlsd": ("MLSDdetector", True, {}),
    "depth_midas": ("MidasDetector", True, {}),
    "depth_zoe": ("ZoeDetector", True, {}),
    "normal": ("NormalBaeDetector", True, {}),
    "openpose": ("OpenposeDetector", True, {}),
}
PREPROCESSORS = ("sobel", *DETECTORS)


class ControlPreprocessor:
    """Makes control images.

    Args:
        name: "sobel", which needs nothing else, or a detector of controlnet_aux.
        weights: repository or folder with the detectors' weights.
        device: that the detector runs on.

    Raises:
        ValueError: an unknown name, or controlnet_aux is not installed.
    """

    def __init__(self, name: str = "sobel", *, weights: str = WEIGHTS, device: str | torch.device = "cpu") -> None:
        if name not in PREPROCESSORS:
            raise ValueError(f"`name` must be one of {PREPROCESSORS}, got {name!r}.")
        self.name = name
        self._detector: Any = None
        if name == "sobel":
            return
        class_name, has_weights, self._options = DETECTORS[name]
        try:
            detector = getattr(importlib.import_module("controlnet_aux"), class_name)
        except ImportError as error:
            raise ValueError(
                f"`name` {name!r} needs a package: `pip install controlnet_aux`; or take 'sobel' ({error})."
            ) from error
        self._detector = detector.from_pretrained(weights) if has_weights else detector()
        if hasattr(self._detector, "to"):
            self._detector.to(device)

    def __call__(self, images: Tensor | Image.Image) -> Any:
        """Control images.

        Args:
            images: `[B, 3, H, W]` in [-1, 1], or a PIL image.

        Returns:
            The same in the same form and size: white on black where it is lines, three channels.

        Raises:
            ValueError: the detector returns something else than an image.
        """
        if isinstance(images, Image.Image):
            pixels = to_pixels("images", images) * 2 - 1
            found = (self(pixels)[0] / 2 + 0.5).mul(255).round().byte()
            return Image.fromarray(found.movedim(0, -1).numpy())
        if self._detector is None:
            return sobel_edges(images)
        return torch.stack([self._detect(image) for image in images.cpu()]).to(images.device)

    def _detect(self, image: Tensor) -> Tensor:
        """The control image `[3, H, W]` of one image."""
        size = (image.shape[-2], image.shape[-1])
        pixels = ((image.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        side = min(size)  # of the image that the detector sees, whose sides it rounds to multiples of 64
        found = self._detector(
            pixels, detect_resolution=side, image_resolution=side, output_type="np", **self._options
        )
        if not isinstance(found, np.ndarray) or found.ndim not in (2, 3):
            raise ValueError(f"The detector {self.name!r} must return an image as an array, but returned {found!r}.")
        control = to_pixels("images", found)
        control = control if control.shape[-2:] == size else F.interpolate(control, size, mode="bilinear")
        return control[0] * 2 - 1
