"""Checks of arguments, fields of configs and computed values: each raises, naming what is wrong."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch


LARGEST = 2**20  # far above any width, size or number of steps that is meant


class NotFiniteError(ValueError):
    """A model has computed NaN or infinite values: its weights are damaged, or something overflows."""


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


def check_size(name: str, size: int, multiple: int) -> None:
    """Raises where `size`, the argument `name` in pixels, is not a positive multiple of `multiple`."""
    if size > 0 and size % multiple == 0:
        return
    below = size // multiple * multiple
    choices = f"{below} or {below + multiple}" if below > 0 else f"{multiple}"
    raise ValueError(f"`{name}` must be a multiple of {multiple}, got {size}. Use {choices}.")


def check_frames(frames: int, step: int, patch: int, most: int, reason: str) -> None:
    """Raises where a video cannot have so many frames.

    Args:
        frames: the argument of that name.
        step: frames that the autoencoder makes of a latent frame, but for the first one.
        patch: latent frames of a token.
        most: latent frames at most.
        reason: of that limit.
    """
    before, rest = divmod(frames - 1, step)
    if rest:
        below = before * step + 1
        raise ValueError(
            f"`frames` must be one more than a multiple of {step}, because the autoencoder makes {step} frames of"
            f" a latent frame and one of the first, got {frames}. Use {below} or {below + step}."
        )
    if (before + 1) % patch:
        raise ValueError(
            f"`frames` must give a number of latent frames divisible by {patch} (`patch_size` of the"
            f" transformer), got {frames} frames, which are {before + 1} latent ones. Use"
            f" {(before // patch * patch + patch - 1) * step + 1}."
        )
    if before + 1 > most:
        raise ValueError(f"`frames` must be at most {(most - 1) * step + 1} ({reason}), got {frames}.")


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError where `value` is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def check_computed(part: str, what: str, values: "torch.Tensor", dtype: "torch.dtype", advice: str = "") -> None:
    """Raises NotFiniteError where values are NaN or infinite. Reads the device: once a stage, never in a loop.

    Args:
        part: name of the component, `part`.
        what: `values` are.
        dtype: that the model computes in.
        advice: what may be the cause besides weights and dtype.
    """
    if bool(values.isfinite().all()):
        return
    if str(dtype) == "torch.float16":
        advice = f"float16 overflows; load it in bfloat16, or call `pipe.{part}.to(torch.bfloat16)`."
    raise NotFiniteError(
        f"`{part}` gave NaN or infinite {what} in {dtype}. {advice or 'Its weights are damaged; load them again.'}"
    )


def check_texts(name: str, texts: Sequence[Any], given: Any) -> None:
    """Raises where one of `texts`, which the argument `name` was `given`, is not text that UTF-8 can encode."""
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"`{name}` must be a string or a list of strings, got {given!r}.")
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{name}` must be text that UTF-8 can encode, but has the lone surrogate {text[error.start]!r} at"
                f" character {error.start}. Remove it."
            ) from None
