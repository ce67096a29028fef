"""Images of a source at the sizes of a training, and batches of them."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffusers_sana.files import PathLike, digest
from diffusers_sana.images import image_size, read_image
from diffusers_sana.training.batches import unchanged_random_state
from diffusers_sana.training.buckets import bucket_batches, nearest_size
from diffusers_sana.training.caption_sampling import SampledCaptions
from diffusers_sana.training.image_sources import (
    Captions,
    FolderSource,
    ImageDataConfig,
    ImageSource,
    find_source,
    image_digest,
)


def load_pixels(file: PathLike | BinaryIO, height: int, width: int, name: str = "") -> Tensor:
    """An image file as `[3, height, width]` in [-1, 1]: scaled to cover, then cut to the centre.

    Read as by `diffusers_sana.images`. Small images are scaled up.
    """
    image = read_image(file, name)
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


class Images(Dataset):
    """The images of a source, each scaled and cut to one of several sizes.

    Items are `{"pixel_values": [3, H, W] in [-1, 1], "text": caption or ""}`. With several captions of each image
    (`captions.jsonl`) the text is the one of the highest CLIP score, and `texts` has all of them. Each image has the
    size out of `sizes` whose shape is nearest to its own; `sizes_of_items` lists which.

    Args:
        source: gives images and captions.
        sizes: (height, width) pairs in pixels.

    Attributes:
        names, captions: of each item.
        choices: with `captions.jsonl` all captions of each item, for `SampledCaptions`; else None.
    """

    def __init__(self, source: ImageSource, sizes: list[tuple[int, int]]):
        self.source, self.names, self.captions, self.choices = source, source.names, source.captions, source.choices
        self.sizes_of_items = [sizes[0]] * len(self.names)
        if len(sizes) > 1:
            numbers = tqdm(range(len(self.names)), desc="reading sizes", delay=5)
            self.sizes_of_items = [nearest_size(*self.image_size(index), sizes) for index in numbers]

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image as it is stored, upright."""
        file = self.source.open(index)
        return image_size(file, "" if isinstance(file, Path) else self.names[index])

    def made_from(self, index: int) -> list[Any]:
        """What an item depends on, for `fill_cache`."""
        stamp = self.source.stamp(index) or image_digest(self.source, index)
        texts = [self.captions[index]]
        if self.choices is not None:
            texts += [caption.text for caption in self.choices[index]]
        return [self.names[index], stamp, self.sizes_of_items[index], texts]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.source.open(index)
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


def load_images(config: ImageDataConfig, sizes: list[tuple[int, int]], captions: Captions = "expected") -> Images:
    """`Images` of `config.data`: a folder, WebDataset tars or a dataset of the Hub. See `find_source` for errors."""
    return Images(find_source(config, captions), sizes)


class NumberedBatches(Dataset):
    """The batches of a map-style dataset as items, each made under random numbers of its own.

    A batch is indexed by its number and the indices of its items. What is random in an item or in `collate_fn` depends
    on the seed and that number only, so that neither the number of workers nor an interruption changes it, and making
    a batch leaves the random numbers of the training alone.
    """

    def __init__(self, dataset: Any, seed: int, collate_fn: Callable[[list[Any]], dict[str, Any]]):
        self.dataset, self.seed, self.collate_fn = dataset, seed, collate_fn

    def __getitem__(self, numbered: tuple[int, list[Any]]) -> dict[str, Any]:
        number, indices = numbered
        with unchanged_random_state(int(digest(self.seed, number)[:15], 16)):
            return self.collate_fn([self.dataset[index] for index in indices])


class BatchLoader:
    """Endless shuffled batches of one size each: called with the number of batches already used by all processes
    together, it returns a DataLoader of those that follow for this process.

    Attributes:
        fingerprint: what the order of the batches depends on. A run that is taken up again must have the same.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int,
        num_workers: int,
        collate_fn: Callable[[list[Any]], dict[str, Any]],
    ):
        self.dataset, self.batch_size, self.seed, self.num_workers = dataset, batch_size, seed, num_workers
        self.collate_fn = collate_fn
        self.state = PartialState()
        sizes = dataset.sizes_of_items
        self.fingerprint = {
            "items": len(sizes),
            "sizes_of_items": digest([list(size) for size in sizes]),
            "names": digest(getattr(dataset, "names", [])),
            "batch_size": batch_size,
            "seed": seed,
        }

    def __call__(self, start: int) -> DataLoader:
        sizes, rank, processes = self.dataset.sizes_of_items, self.state.process_index, self.state.num_processes
        numbers = count(start + rank, processes)
        indices: Iterator[list[Any]] = bucket_batches(sizes, self.batch_size, self.seed, start, rank, processes)
        numbered: Iterator[tuple[int, list[Any]]] = zip(numbers, indices, strict=False)  # both are endless
        if isinstance(self.dataset, SampledCaptions):
            batches_an_epoch = sum(-(-items // self.batch_size) for items in Counter(sizes).values())
            numbered = (
                (number, [(number // batches_an_epoch, index) for index in batch]) for number, batch in numbered
            )
        return DataLoader(
            NumberedBatches(self.dataset, self.seed, self.collate_fn),
            batch_size=None,
            sampler=numbered,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_training,
            generator=torch.Generator().manual_seed(self.seed),
        )


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_training(worker: int) -> None:
    """In a worker: what is sent to the process group, as by Ctrl-C and launchers, is for the process that trains.

    It finishes its step and ends its workers, by a SIGTERM to each if need be.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def make_loader(
    dataset: Any,
    batch_size: int,
    seed: int,
    num_workers: int,
    collate_fn: Callable[[list[Any]], dict[str, Any]] | None = None,
) -> BatchLoader:
    """Endless shuffled batches of one size each, as a function of the number of batches already used.

    Args:
        dataset: map-style, with `sizes_of_items`; or `SampledCaptions`, which is told the epoch.
        batch_size: items a batch and process; the last batch of a size in an epoch may be smaller.
        seed: seed of the order, and of what is random in items and in `collate_fn`.
        num_workers: processes that load items; their number changes no batch.
        collate_fn: makes a batch of items; default: `collate`, for dictionaries of tensors and strings.
    """
    return BatchLoader(dataset, batch_size, seed, num_workers, collate_fn or collate)


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
