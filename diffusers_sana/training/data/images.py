"""Images of a source at the sizes of a training."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from diffusers_sana.files import PathLike
from diffusers_sana.images import image_size, read_image
from diffusers_sana.training.config import ImageDataOptions
from diffusers_sana.training.data.batches import nearest_size
from diffusers_sana.training.data.sources import (
    Captions,
    FolderSource,
    ImageSource,
    find_source,
    image_digest,
)


def load_pixels(file: PathLike | BinaryIO, height: int, width: int, name: str = "") -> Tensor:
    """An image file as `[3, height, width]` in [-1, 1]: scaled to cover, then cut to the centre.

    Read as by `diffusers_sana.images`. Small images are scaled up.
    """
    return to_size(read_image(file, name), height, width)


def to_size(image: Image.Image, height: int, width: int) -> Tensor:
    """An RGB image as `[3, height, width]` in [-1, 1], scaled and cut as by `load_pixels`."""
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


class Images(Dataset):
    """The images of a source, each scaled and cut to one of several sizes, or to one of each of several lists of them.

    Items are `{"pixel_values": [3, H, W] in [-1, 1], "text": caption or ""}`. With several captions of each image
    (`captions.jsonl`) the text is the one of the highest CLIP score, and `texts` has all of them. Each image has the
    size out of `sizes` whose shape is nearest to its own; `sizes_of_items` lists which.

    Args:
        source: gives images and captions.
        sizes: (height, width) pairs in pixels. With further lists every image is an item of each, those of the first
            list first.

    Attributes:
        names, captions: of each item.
        choices: with `captions.jsonl` all captions of each item, for `SampledCaptions`; else None.
    """

    def __init__(self, source: ImageSource, *sizes: list[tuple[int, int]]):
        self.source, count = source, len(source.names)
        shapes = [(1, 1)] * count
        if any(len(each) > 1 for each in sizes):
            shapes = [self.image_size(index) for index in tqdm(range(count), desc="reading sizes", delay=5)]
        self.sizes_of_items = [nearest_size(*shape, each) for each in sizes for shape in shapes]
        self.names, self.captions = source.names * len(sizes), source.captions * len(sizes)
        self.choices = None if source.choices is None else source.choices * len(sizes)

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image as it is stored, upright."""
        index %= len(self.source.names)
        file = self.source.open(index)
        return image_size(file, "" if isinstance(file, Path) else self.source.names[index])

    def made_from(self, index: int) -> list[Any]:
        """What an item depends on, for `fill_cache`."""
        at = index % len(self.source.names)
        stamp = self.source.stamp(at) or image_digest(self.source, at)
        texts = [self.captions[index]]
        if self.choices is not None:
            texts += [caption.text for caption in self.choices[index]]
        return [self.names[index], stamp, self.sizes_of_items[index], texts]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.source.open(index % len(self.source.names))
        pixels = load_pixels(file, *self.sizes_of_items[index], "" if isinstance(file, Path) else self.names[index])
        item = {"pixel_values": pixels, "text": self.captions[index]}
        if self.choices is not None:
            item["texts"] = [caption.text for caption in self.choices[index]]
        return item


class ImageFolder(Images):
    """`Images` of a `FolderSource`: the images in a folder, with the captions found there.

    Args:
        folder: searched with its subfolders, in sorted order.
        sizes: see `Images`.
        options: those of `FolderSource`.

    Attributes:
        paths: of each item.
    """

    def __init__(self, folder: str | Path, sizes: list[tuple[int, int]], **options: Any):
        source = FolderSource(folder, **options)
        super().__init__(source, sizes)
        self.paths = source.paths


def load_images(options: ImageDataOptions, sizes: list[tuple[int, int]], captions: Captions = "expected") -> Images:
    """`Images` of `options.data`: a folder, WebDataset tars or a dataset of the Hub. See `find_source` for errors."""
    return Images(find_source(options, captions), sizes)
