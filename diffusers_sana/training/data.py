"""Batches of images from a folder, with captions where `captions.jsonl` or `metadata.jsonl` gives them."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from diffusers_sana.images import SUFFIXES, image_size, read_image
from diffusers_sana.training.buckets import bucket_batches, nearest_size
from diffusers_sana.training.caption_sampling import (
    CAPTIONS_FILE,
    Caption,
    SampledCaptions,
    best_caption,
    read_captions,
)


def find_images(root: Path) -> list[Path]:
    """The image files under a folder and its subfolders, sorted."""
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)


def read_metadata(root: Path) -> list[tuple[str, str]]:
    """File name and text of each line of a folder's `metadata.jsonl`; none where there is no such file."""
    path = root / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(row["file_name"], row["text"]) for row in rows]


def load_pixels(path: Path, height: int, width: int) -> Tensor:
    """An image file as `[3, height, width]` in [-1, 1]: scaled to cover, then cut to the centre.

    Read as by `diffusers_sana.images`. Small images are scaled up.
    """
    image = read_image(path)
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


class ImageFolder(Dataset):
    """The images under a folder; with `captions.jsonl`, or else `metadata.jsonl` (lines of `file_name`, `text`), only
    those it lists.

    Items are `{"pixel_values": [3, H, W] in [-1, 1], "text": caption or ""}`. With `captions.jsonl` the text is the
    caption of the highest CLIP score, and `texts` has all of them. Each image has the size out of `sizes` whose shape
    is nearest to its own; `sizes_of_items` lists which.

    Args:
        folder: searched with its subfolders, in sorted order.
        sizes: (height, width) pairs in pixels.

    Attributes:
        captions: the text of each item.
        choices: with `captions.jsonl` all captions of each item, for `SampledCaptions`; else None.
    """

    def __init__(self, folder: str, sizes: list[tuple[int, int]]):
        root = Path(folder)
        self.choices: list[list[Caption]] | None = None
        if (root / CAPTIONS_FILE).exists():
            found = read_captions(root / CAPTIONS_FILE)
            self.paths = [root / file_name for file_name in found]
            self.choices = list(found.values())
            self.captions = [best_caption(captions).text for captions in self.choices]
        elif (root / "metadata.jsonl").exists():
            rows = read_metadata(root)
            self.paths = [root / file_name for file_name, _ in rows]
            self.captions = [text for _, text in rows]
        else:
            self.paths = find_images(root)
            self.captions = [""] * len(self.paths)
        if not self.paths:
            raise ValueError(f"`data` must be a folder with images {SUFFIXES}, got {folder!r}. Check the path.")
        self.sizes_of_items = []
        for path in self.paths:
            self.sizes_of_items.append(nearest_size(*image_size(path), sizes))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixel_values = load_pixels(self.paths[index], *self.sizes_of_items[index])
        item = {"pixel_values": pixel_values, "text": self.captions[index]}
        if self.choices is not None:
            item["texts"] = [caption.text for caption in self.choices[index]]
        return item


def make_loader(
    dataset: Any,
    batch_size: int,
    seed: int,
    num_workers: int,
    collate_fn: Callable[[list[Any]], dict[str, Any]] | None = None,
) -> Callable[[int], DataLoader]:
    """Endless shuffled batches of one size each, as a function of the number of batches already used.

    Args:
        dataset: map-style, with `sizes_of_items`; or `SampledCaptions`, which is told the epoch.
        batch_size: items a batch and process; the last batch of a size in an epoch may be smaller.
        seed: seed of the order.
        num_workers: processes that load items.
        collate_fn: makes a batch of items; default: `collate`, for dictionaries of tensors and strings.
    """
    state = PartialState()

    def from_batch(start: int) -> DataLoader:
        sizes, processes = dataset.sizes_of_items, state.num_processes
        indices: Iterator[list[Any]] = bucket_batches(sizes, batch_size, seed, start, state.process_index, processes)
        if isinstance(dataset, SampledCaptions):
            numbers = count(start * processes + state.process_index, processes)
            batches_an_epoch = sum(-(-items // batch_size) for items in Counter(sizes).values())
            indices = (
                [(number // batches_an_epoch, index) for index in batch]
                for number, batch in zip(numbers, indices, strict=False)  # both are endless
            )
        return DataLoader(dataset, batch_sampler=indices, num_workers=num_workers, collate_fn=collate_fn or collate)

    return from_batch


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack items; text vectors of different lengths are padded, and their mask is added."""
    batch: dict[str, Any] = {}
    for name in items[0]:
        values = [item[name] for item in items]
        if name == "prompt_embeds":
            batch["prompt_embeds"] = pad_sequence(values, batch_first=True)
            masks = [torch.ones(len(value), dtype=torch.long) for value in values]
            batch["prompt_attention_mask"] = pad_sequence(masks, batch_first=True)
        else:
            batch[name] = torch.stack(values) if isinstance(values[0], Tensor) else values
    return batch
