"""Multi-aspect buckets: which size each image is trained at, and batches that hold one size each."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count, islice

import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN


# What the pipelines round sizes to, by the side of the square.
TABLES = {
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
    4096: ASPECT_RATIO_4096_BIN,
}


def bucket_sizes(resolution: int, multiple: int = 32) -> list[tuple[int, int]]:
    """The (height, width) pairs of Sana's buckets of about `resolution`^2 pixels.

    They are those the pipelines round to at 512, 1024, 2048 and 4096; at another resolution those of 1024, scaled.
    Sides are rounded to a `multiple`, and equal sizes merged.
    """
    if resolution < multiple:
        raise ValueError(f"`resolution` must be at least {multiple}, got {resolution}. Use a larger one.")
    scale = (1 if resolution in TABLES else resolution / 1024) / multiple
    sizes = (
        (max(1, round(height * scale)) * multiple, max(1, round(width * scale)) * multiple)
        for height, width in TABLES.get(resolution, ASPECT_RATIO_1024_BIN).values()
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
    """Endless batches of item indices, every item once an epoch, one size a batch.

    Args:
        sizes_of_items: size of each item.
        batch_size: largest number of items a batch; what is left of a size at the end of an epoch is a smaller batch.
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
