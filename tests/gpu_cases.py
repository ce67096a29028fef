"""The cases of `bench_gpu` for its dry run: tiny, on a CPU, and between two that go wrong."""

import os
import re
import signal
from collections.abc import Callable, Iterator

from triton.runtime.errors import OutOfResources

from benchmarks.bench_gpu import Scale, cases


TRITON_ERROR, KILLED = "a kernel that does not fit", "a case that is killed"


def dry_cases() -> dict[str, Callable[[], object]]:
    """Of cases that differ only in numbers, which are the same when tiny, the first.

    Without those of VILA-U, which `test_bench_vila_u.py` runs.
    """
    kinds: dict[str, tuple[str, Callable[[], object]]] = {}
    for name, case in cases(Scale("cpu", tiny=True)):
        if "vila-u" not in name:
            kinds.setdefault(re.sub(r"[\d.]+", "", name), (name, case))
    return dict(kinds.values())


def with_faults() -> Iterator[tuple[str, Callable[[], object]]]:
    yield TRITON_ERROR, too_large
    yield from dry_cases().items()
    yield KILLED, killed


def too_large() -> None:
    raise OutOfResources(required=300_000, limit=232_448, name="shared memory")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
