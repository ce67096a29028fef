"""What products make of a quantized weight once and keep, such as an 8-bit copy of 4-bit codes, until it changes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Kept:
    """Values by the codes of their weight, which they do not keep alive.

    Attributes:
        changes: how many values have been dropped or replaced: who has recorded the address of one compares this.
    """

    def __init__(self) -> None:
        # By the codes: of which tensors, in which version, and the value.
        self._values: Any = WeakTensorKeyDictionary()
        self.changes = 0
        _ALL.append(self)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, qweight: Tensor) -> bool:
        return qweight in self._values

    def get(self, make: Callable[..., Any], qweight: Tensor, *others: Tensor | None) -> Any:
        """`make(qweight, *others)` from an earlier call, made again when one of the tensors has changed."""
        parts = (qweight, *others)
        # Tensors made under `torch.inference_mode` have no version counter: who changes them in place calls `forget`.
        version = tuple(
            (id(part), part.data_ptr(), part.is_inference() or part._version) for part in parts if part is not None
        )
        if qweight in self._values and self._values[qweight][0] != version:
            self.drop(qweight)
        if qweight not in self._values:
            self._values[qweight] = version, make(*parts)
        return self._values[qweight][1]

    def drop(self, qweight: Tensor) -> None:
        """Drops the value of a weight, if there is one."""
        self.changes += self._values.pop(qweight, None) is not None


_ALL: list[Kept] = []


def forget(qweight: Tensor) -> None:
    """Drops all that is kept of a weight."""
    for kept in _ALL:
        kept.drop(qweight)


def kept_changes() -> int:
    """How many values have been dropped or replaced so far."""
    return sum(kept.changes for kept in _ALL)
