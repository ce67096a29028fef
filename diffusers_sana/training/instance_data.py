"""A few pictures of one thing or style, and pictures of its class beside them (DreamBooth, arXiv 2208.12242)."""

from typing import Any

import torch
from torch.utils.data import Dataset

from diffusers_sana.training.data import ImageFolder, Images


class WithPrior(Dataset):
    """As many items of the class as of the instance, each with its `loss_weight`; the fewer ones are repeated.

    Args:
        instance: items to learn, with `sizes_of_items`.
        prior: items of what is not to be forgotten.
        weight: of the loss on `prior`; that on `instance` has 1.
    """

    def __init__(self, instance: Any, prior: Any, weight: float):
        self.parts = ((instance, 1.0), (prior, weight))
        self.sizes_of_items = [self._find(index)[0].sizes_of_items[self._find(index)[1]] for index in range(len(self))]

    def _find(self, index: int) -> tuple[Any, int, float]:
        items, weight = self.parts[index % 2]
        return items, index // 2 % len(items), weight

    def __len__(self) -> int:
        return 2 * max(len(items) for items, _ in self.parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        items, at, weight = self._find(index)
        return items[at] | {"loss_weight": torch.tensor(weight)}


def captioned_folder(folder: str, sizes: list[tuple[int, int]], prompt: str) -> Images:
    """The images of a folder, with captions from its files, or `prompt` where there is none."""
    return with_prompt(ImageFolder(folder, sizes, captions="optional"), prompt)


def with_prompt(images: Images, prompt: str) -> Images:
    """The images, of which those without a caption have `prompt`.

    Raises:
        ValueError: there are such images, and `prompt` is empty.
    """
    for index, name in enumerate(images.names):
        images.captions[index] = images.captions[index] or prompt
        if not images.captions[index]:
            raise ValueError(f"`instance_prompt` must be given for images without a caption, such as {name}, got ''.")
    return images
