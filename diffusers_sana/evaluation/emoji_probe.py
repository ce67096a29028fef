"""A small network that recognizes what an emoji image shows, to evaluate the bundled checkpoints.

Legend: B batch, H/W height and width, F features.
"""

from collections.abc import Sequence

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_sana.evaluation.observations import Detection, Observation


RESOLUTION = 128
# Place named in a prompt -> box of a single object at that place, as in `Detection`.
PLACES = {
    "": (0.1, 0.1, 0.9, 0.9),
    "left": (0.04, 0.25, 0.54, 0.75),
    "right": (0.46, 0.25, 0.96, 0.75),
    "top": (0.25, 0.04, 0.75, 0.54),
    "bottom": (0.25, 0.46, 0.75, 0.96),
}
# Boxes of several objects, by their number: two from left to right; three with the first one above.
SEVERAL = {
    "2": ((0.025, 0.265, 0.495, 0.735), (0.505, 0.265, 0.975, 0.735)),
    "3": ((0.25, 0.0, 0.75, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)),
}


def _block(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class EmojiProbe(nn.Module, PyTorchModelHubMixin):
    """Recognizes objects, number, place, background color and style in an image of one to three emoji.

    Two attention maps find the first and the second object, left to right; one layer classifies what either has found,
    wherever it is. Three objects are of one kind. `from_pretrained(folder)` and `save_pretrained(folder)` are those of
    `huggingface_hub`: `config.json` and `model.safetensors`.

    Args:
        objects: names of the objects it distinguishes.
        colors: names of background colors.
        styles: names of styles.
        object_features: number of features per object.
        layout_features: number of features for everything else.
        max_objects: the largest number of objects, 2 or 3.
    """

    def __init__(
        self,
        objects: Sequence[str],
        colors: Sequence[str],
        styles: Sequence[str],
        object_features: int = 96,
        layout_features: int = 64,
        max_objects: int = 2,
    ):
        super().__init__()
        self.answers = {
            "first": tuple(objects),
            "second": tuple(objects),
            "number": ("1", *SEVERAL)[:max_objects],
            "place": tuple(PLACES),
            "color": tuple(colors),
            "style": tuple(styles),
        }
        self.trunk = nn.Sequential(
            _block(3, 32, kernel=6, stride=4),
            _block(32, 64, kernel=3, stride=2),
            _block(64, 64, kernel=3, stride=1),
            _block(64, 128, kernel=3, stride=2),
            _block(128, 128, kernel=3, stride=1),
        )
        # Input: features of a place, their mean over the image, and the coordinates of the place.
        self.attention = nn.Sequential(nn.Conv2d(128 + 128 + 2, 64, 1), nn.ReLU(), nn.Conv2d(64, 2, 1))
        # Normalized, so that no feature outweighs the others in FID and KID.
        self.object = nn.Sequential(nn.Linear(128, object_features), nn.BatchNorm1d(object_features, affine=False))
        self.layout = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128 * 16, layout_features),
            nn.BatchNorm1d(layout_features, affine=False),
        )
        self.name_object = nn.Linear(object_features, len(objects))
        self.name_layout = nn.ModuleDict(
            {
                question: nn.Linear(layout_features, len(words))
                for question, words in self.answers.items()
                if question not in ("first", "second")
            }
        )

    def features(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1], of any size, to `[B, F]`: first object, second object, layout."""
        if images.shape[-2:] != (RESOLUTION, RESOLUTION):
            images = F.interpolate(images, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
        cells = self.trunk(images * 2 - 1)
        line = torch.linspace(-1, 1, cells.shape[-1], device=cells.device, dtype=cells.dtype)
        places = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(cells), -1, -1, -1)
        whole = cells.mean((2, 3), keepdim=True).expand_as(cells)
        weights = self.attention(torch.cat([cells, whole, places], dim=1)).flatten(2).softmax(-1)
        found = torch.einsum("bkn,bcn->kbc", weights, cells.flatten(2))  # [2, B, C]
        objects = self.object(found.flatten(0, 1)).chunk(2)
        return torch.cat([*objects, self.layout(cells)], dim=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `[B, 3, H, W]` in [0, 1] to logits `[B, number of answers]` per question."""
        hidden = F.relu(self.features(images))
        width = self.name_object.in_features
        first, second, layout = hidden.split([width, width, hidden.shape[1] - 2 * width], dim=1)
        named = {"first": self.name_object(first), "second": self.name_object(second)}
        return named | {question: layer(layout) for question, layer in self.name_layout.items()}

    @torch.no_grad()
    def observe(self, images: Tensor) -> list[Observation]:
        """What each of the images `[B, 3, H, W]` in [0, 1] shows."""
        found = {name: logits.softmax(-1).max(-1) for name, logits in self(images).items()}
        observations = []
        for i in range(len(images)):
            word = {name: self.answers[name][int(best.indices[i])] for name, best in found.items()}
            score = {name: float(best.values[i]) for name, best in found.items()}
            boxes = SEVERAL.get(word["number"], (PLACES[word["place"]],))
            names = ("first", "second") if word["number"] == "2" else ("first",) * len(boxes)
            objects = tuple(Detection(word[name], score[name], box) for name, box in zip(names, boxes, strict=True))
            observations.append(Observation(objects, word["color"], word["style"]))
        return observations
