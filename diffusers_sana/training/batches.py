"""Where batches come from, and going on where they ended."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any


# Either an iterable, begun anew whenever it ends, or a function from the number of batches already used to the
# iterable of the batches that follow; only the latter resumes at the very batch where the run had stopped.
Batches = Iterable[dict[str, Any]] | Callable[[int], Iterable[dict[str, Any]]]


def iterate_batches(batches: Batches, start: int) -> Iterator[dict[str, Any]]:
    """The batches from the `start`-th on, without end; raises a ValueError when there are none."""
    while True:
        found = False
        for batch in batches(start) if callable(batches) else batches:
            found = True
            start += 1
            yield batch
        if not found:
            raise ValueError("`batches` must yield batches, got none. A generator cannot be begun anew; pass a list.")
