"""What products make of parameters once and keep until they change: an 8-bit copy of 4-bit codes, reciprocals."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary


@dataclass
class _Entry:
    """A value, and what it was made of.

    Attributes:
        value: anything.
        version: of the tensors, see `_version`.
        others: the tensors but for the codes, not kept alive.
        memory: that of the codes, not kept alive.
    """

    value: Any
    version: tuple[Any, ...]
    others: list[TensorWeakRef]
    memory: weakref.ref[Any]


class Kept:
    """Values by the codes of their weight, which they do not keep alive.

    A value ends with the memory of the codes, not only with their tensor: offloading gives a tensor other memory.
    """

    def __init__(self) -> None:
        self._entries: Any = WeakTensorKeyDictionary()
        self._made = 0
        _ALL.append(self)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, qweight: Tensor) -> bool:
        return qweight in self._entries

    @property
    def changes(self) -> int:
        """How many values have been dropped or replaced: who has recorded the address of one compares this."""
        return self._made - len(self)

    def get(self, make: Callable[..., Any], qweight: Tensor, *others: Tensor | None) -> Any:
        """`make(qweight, *others)` from an earlier call, made again when one of the tensors has changed."""
        version = _version((qweight, *others))
        entry = self._entries.get(qweight)
        if entry is None or entry.version != version:
            self.drop(qweight)  # first, to have its memory for the new one
            entry = _Entry(
                make(qweight, *others),
                version,
                [TensorWeakRef(other) for other in others if other is not None],
                weakref.ref(qweight.untyped_storage(), self._dropping(qweight)),
            )
            self._entries[qweight] = entry
            self._made += 1
        return entry.value

    def drop(self, qweight: Tensor) -> None:
        """Drops the value of a weight, if there is one."""
        self._entries.pop(qweight, None)

    def drop_stale(self) -> None:
        """Drops the values of weights that have changed since."""
        for qweight, entry in list(self._entries.items()):
            if _version((qweight, *(other() for other in entry.others))) != entry.version:
                self.drop(qweight)

    def _dropping(self, qweight: Tensor) -> Callable[[Any], None]:
        """What drops the value of a weight whose memory ends; does not keep the weight alive."""
        codes = TensorWeakRef(qweight)

        def drop(_memory: Any) -> None:
            qweight = codes()
            if qweight is not None:
                self.drop(qweight)

        return drop


_ALL: list[Kept] = []


def forget(*weights: Tensor) -> None:
    """Drops all that is kept of weights."""
    for kept in _ALL:
        for weight in weights:
            kept.drop(weight)


def kept_changes() -> int:
    """How many values have been dropped or replaced so far; drops those first whose weight was written into."""
    for kept in _ALL:
        kept.drop_stale()
    return sum(kept.changes for kept in _ALL)


def _version(parts: Sequence[Any]) -> tuple[Any, ...]:
    """What differs when a tensor is another one, has moved or was written into.

    Tensors made under `torch.inference_mode` do not count their changes, also after `.to`: who writes into those calls
    `forget`.
    """
    return tuple((id(part), part.data_ptr(), _count_of_changes(part)) for part in parts if part is not None)


def _count_of_changes(tensor: Tensor) -> int | None:
    try:
        return tensor._version
    except RuntimeError:
        return None
