"""One lock per object, so that several threads can share models and tokenizers that keep state while they run.

The locks are kept beside the objects, which therefore can still be copied and pickled.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

from diffusers.utils.torch_utils import unwrap_module


_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_GUARD = Lock()


@contextmanager
def exclusive(*owners: Any) -> Iterator[None]:
    """Within the block, this thread alone runs `owners`, given in the order in which every caller names them.

    A thread may enter the block of an object again. A compiled module counts as the module that it was made of.

    Args:
        owners: models or tokenizers; None stands for nothing.
    """
    if not owners:
        yield
        return
    owner, *others = owners
    with _lock_of(owner) if owner is not None else nullcontext(), exclusive(*others):
        yield


def _lock_of(owner: Any) -> Any:
    owner = unwrap_module(owner)
    with _GUARD:
        if owner not in _LOCKS:
            _LOCKS[owner] = RLock()
        return _LOCKS[owner]
