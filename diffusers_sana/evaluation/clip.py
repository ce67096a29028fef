"""CLIP: how well an image matches a text, and which of several texts matches best.

Legend: N images, M texts, F features, H/W height and width.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.evaluation.images import to_images


class Clip:
    """A `CLIPModel` of transformers with its processor.

    Args:
        model: folder or Hub id, such as "openai/clip-vit-base-patch16", which most published scores use.
        device: where it runs.
        processor: folder or Hub id of tokenizer and image processor; None: those of the model.

    Raises:
        OSError: there is no such model.
    """

    def __init__(self, model: str, device: str = "cpu", processor: str | None = None):
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        self.model = cast(Any, CLIPModel.from_pretrained(model)).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(processor or model)
        self.image_processor = CLIPImageProcessorPil.from_pretrained(
            processor or model
        )  # based on PIL: needs no torchvision

    @torch.no_grad()
    def image_features(self, images: list[Image.Image]) -> Tensor:
        """Unit vectors `[N, F]`."""
        pixels = self.image_processor(images, return_tensors="pt")["pixel_values"].to(self.model.device)
        return F.normalize(self.model.get_image_features(pixels).pooler_output)

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Unit vectors `[M, F]`; longer texts are truncated to the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
        return F.normalize(self.model.get_text_features(**tokens.to(self.model.device)).pooler_output)

    def features(self, images: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` in [0, 1] to `[N, F]`, for FID and KID."""
        return self.image_features(to_images(images))

    def cosines(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosines of images `[N, 3, H, W]` in [0, 1] and their own texts: `[N]`, on the CPU."""
        pairs = zip(images.split(16), (list(texts[i : i + 16]) for i in range(0, len(texts), 16)), strict=True)
        return torch.cat([(self.features(part) * self.text_features(lines)).sum(1) for part, lines in pairs]).cpu()

    def scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """100 times the cosine of each image and its own text, at least 0: `[N]` (CLIPScore, arXiv 2104.08718)."""
        return 100 * self.cosines(images, texts).clamp(min=0)

    def choose(self, image: Image.Image, texts: list[str]) -> int:
        """Index of the text that matches an image best."""
        return int((self.text_features(texts) @ self.image_features([image]).T).argmax())
