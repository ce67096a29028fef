"""Batches: multi-aspect buckets of one size each, shuffled, and continued where a run stopped."""

import math
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from diffusers_sana.files import digest
from diffusers_sana.training.data.captions import SampledCaptions


# Either an iterable, started again whenever it ends, or a function from the number of batches already used, by all
# processes together, to the iterable of those that follow for this process; only the latter resumes at the very batch
# where the run had stopped.
Batches = Iterable[dict[str, Any]] | Callable[[int], Iterable[dict[str, Any]]]


def iterate_batches(batches: Batches, start: int, num_processes: int = 1) -> Generator[dict[str, Any]]:
    """The batches from the `start`-th on, without end; raises a ValueError when there are none.

    Args:
        batches: see `Batches`.
        start: batches already used, by all processes together.
        num_processes: how many processes use a batch at the same time.
    """
    while True:
        found = False
        with unchanged_random_state():  # a DataLoader samples the seed of its workers
            iterator = iter(batches(start) if callable(batches) else batches)
        for batch in iterator:
            found = True
            start += num_processes
            yield batch
        if not found:
            raise ValueError(
                "`batches` must yield batches, got none. A generator cannot be started again; pass a list."
            )


def count_items(batch: dict[str, Any]) -> dict[str, int]:
    """The number of images in a batch, `{"images": B}`: the length of its first tensor or list."""
    return {"images": next((len(value) for value in batch.values() if isinstance(value, Tensor | list)), 1)}


@contextmanager
def unchanged_random_state(seed: int | None = None) -> Iterator[None]:
    """Puts the global random number generators of Python, NumPy and PyTorch's CPU back at the end of the block.

    Args:
        seed: what to seed them with inside.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed accelerators too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


# What the pipelines round sizes to, by the side of the square.
TABLES = {
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
    4096: ASPECT_RATIO_4096_BIN,
}


AUTHORS_TABLE = ASPECT_RATIO_2048_BIN  # at all resolutions, scaled: 40 shapes from 1:4 to 4:1


def bucket_sizes(resolution: int, multiple: int = 32, shapes: str = "pipelines") -> list[tuple[int, int]]:
    """The (height, width) pairs of Sana's buckets of about `resolution`^2 pixels.

    Args:
        resolution: side of the square of the same area.
        multiple: sides are rounded to multiples of it, and equal sizes merged.
        shapes: "pipelines": those the pipelines round to at 512, 1024, 2048 and 4096; at another resolution those of
            1024, scaled. "authors": the 40 shapes on which the authors train at every resolution.
    """
    if resolution < multiple:
        raise ValueError(f"`resolution` must be at least {multiple}, got {resolution}. Use a larger one.")
    table, side = TABLES.get(resolution, ASPECT_RATIO_1024_BIN), resolution if resolution in TABLES else 1024
    if shapes == "authors":
        table, side = AUTHORS_TABLE, 2048
    scale = resolution / side / multiple
    sizes = (
        (max(1, round(height * scale)) * multiple, max(1, round(width * scale)) * multiple)
        for height, width in table.values()
    )
    return list(dict.fromkeys(sizes))


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose shape is nearest to `height` : `width`; nearness is the difference of log ratios."""
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(height / width)))


def bucket_batches(
    sizes_of_items: Sequence[tuple[int, int]],
    batch_size: int,
    seed: int = 0,
    start: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
) -> Iterator[list[int]]:
    """Endless batches of item indices, every item once per epoch, one size per batch.

    Args:
        sizes_of_items: size of each item.
        batch_size: largest number of items per batch; the rest of a size at the end of an epoch is a smaller batch.
        seed: seed of the order, which differs between epochs.
        start: number of batches that all processes together have already used.
        process_index, num_processes: each process takes every `num_processes`-th batch.
    """
    batches = (batch for epoch in count() for batch in _epoch(sizes_of_items, batch_size, seed + epoch))
    return islice(batches, start + process_index, None, num_processes)


def _epoch(sizes_of_items: Sequence[tuple[int, int]], batch_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    buckets = defaultdict(list)
    for index in torch.randperm(len(sizes_of_items), generator=generator).tolist():
        buckets[sizes_of_items[index]].append(index)
    batches = [items[at : at + batch_size] for items in buckets.values() for at in range(0, len(items), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class NumberedBatches(Dataset):
    """The batches of a map-style dataset as items, each made with its own random numbers.

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
        fingerprint: what the order of the batches depends on. A resumed run must have the same.
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
        dataset: map-style, with `sizes_of_items`; or `SampledCaptions`, which also receives the epoch.
        batch_size: items per batch and process; the last batch of a size in an epoch may be smaller.
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
