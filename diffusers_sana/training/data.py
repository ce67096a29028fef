"""Batches of images from a folder, with captions where `metadata.jsonl` gives them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from diffusers_sana.training.buckets import bucket_batches, nearest_size


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def load_pixels(path: Path, height: int, width: int) -> Tensor:
    """An image file as `[3, height, width]` in [-1, 1]: scaled to cover, then cut to the centre.

    Transparent pixels are laid over white. Small images are scaled up.
    """
    with Image.open(path) as file:
        image = file.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


class ImageFolder(Dataset):
    """The images under a folder; with `metadata.jsonl` (lines of `file_name`, `text`) only those it lists.

    Items are `{"pixel_values": [3, H, W] in [-1, 1], "text": caption or ""}`. Each image has the size out of `sizes`
    whose shape is nearest to its own; `sizes_of_items` lists which.

    Args:
        folder: searched with its subfolders, in sorted order.
        sizes: (height, width) pairs in pixels.
    """

    def __init__(self, folder: str, sizes: list[tuple[int, int]]):
        root = Path(folder)
        metadata = root / "metadata.jsonl"
        if metadata.exists():
            rows = [json.loads(line) for line in metadata.read_text().splitlines()]
            self.paths = [root / row["file_name"] for row in rows]
            self.captions = [row["text"] for row in rows]
        else:
            self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            self.captions = [""] * len(self.paths)
        if not self.paths:
            raise ValueError(f"`data` must be a folder with images {IMAGE_SUFFIXES}, got {folder!r}. Check the path.")
        self.sizes_of_items = []
        for path in self.paths:
            with Image.open(path) as image:  # reads the header only
                self.sizes_of_items.append(nearest_size(image.height, image.width, sizes))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixel_values = load_pixels(self.paths[index], *self.sizes_of_items[index])
        return {"pixel_values": pixel_values, "text": self.captions[index]}


def make_loader(
    dataset: Any,
    batch_size: int,
    seed: int,
    num_workers: int,
    collate_fn: Callable[[list[Any]], dict[str, Any]] | None = None,
) -> Callable[[int], DataLoader]:
    """Endless shuffled batches of one size each, as a function of the number of batches already used.

    Args:
        dataset: map-style, with `sizes_of_items`.
        batch_size: items a batch and process; the last batch of a size in an epoch may be smaller.
        seed: seed of the order.
        num_workers: processes that load items.
        collate_fn: makes a batch of items; default: `collate`, for dictionaries of tensors and strings.
    """
    state = PartialState()

    def from_batch(start: int) -> DataLoader:
        indices = bucket_batches(
            dataset.sizes_of_items, batch_size, seed, start, state.process_index, state.num_processes
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
