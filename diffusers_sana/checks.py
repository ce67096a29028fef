"""Checks of single values: each raises, naming the argument or the field of a config."""

import math
from numbers import Integral, Real
from typing import Any


LARGEST = 2**20  # far above any width, size or number of steps that is meant


def check_integer(name: str, value: Any, at_least: int = 1, at_most: int = LARGEST) -> None:
    """Raises TypeError where `value` is not an integer, ValueError where it is out of range."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if not at_least <= int(value) <= at_most:
        bound = f"at least {at_least}" if int(value) < at_least else f"at most {at_most}"
        raise ValueError(f"`{name}` must be {bound}, got {value}.")


def check_number(
    name: str, value: Any, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> None:
    """Raises TypeError where `value` is not a number, ValueError where it is not finite or out of range."""
    if not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}.")
    number = float(value)
    bounds = {f"above {above}": number > above, f"at least {at_least}": number >= at_least}
    bounds |= {f"at most {at_most}": number <= at_most}
    for bound, holds in bounds.items():
        if not holds:
            raise ValueError(f"`{name}` must be {bound}, got {value}.")


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError where `value` is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
