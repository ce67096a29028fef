"""Where batches come from, and going on where they ended."""

import random
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


# Either an iterable, begun anew whenever it ends, or a function from the number of batches already used, by all
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
        with unchanged_random_state():  # a DataLoader draws the seed of its workers
            iterator = iter(batches(start) if callable(batches) else batches)
        for batch in iterator:
            found = True
            start += num_processes
            yield batch
        if not found:
            raise ValueError("`batches` must yield batches, got none. A generator cannot be begun anew; pass a list.")


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
