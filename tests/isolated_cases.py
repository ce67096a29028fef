"""Cases for the tests of `benchmarks/isolated.py`; a module without heavy imports, since each worker imports it."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


class KernelError(Exception):
    """Like Triton's errors, no RuntimeError."""


def cases() -> list[tuple[str, Callable[[], int]]]:
    """One of each kind."""
    return [("good", good), ("raises", raises), ("dies", dies), ("hangs", hangs), ("good again", good)]


def good() -> int:
    return os.getpid()


def raises() -> int:
    raise KernelError("out of shared memory")


def dies() -> int:
    os._exit(11)


def hangs() -> int:
    """With a child, as the compilers of Inductor are."""
    child = subprocess.Popen(["sleep", "600"])
    Path(os.environ["CHILD"]).write_text(str(child.pid), encoding="utf-8")
    time.sleep(600)
    return 0


def unlistable() -> list[tuple[str, Callable[[], int]]]:
    """Fails as an import in it would."""
    raise ImportError("no module named 'skimage'")
