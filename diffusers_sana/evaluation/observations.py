"""What an observer has found in a picture: the common language of detectors, probes and checks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Detection:
    """One object of a picture.

    Attributes:
        label: its class.
        score: how sure the observer is, in [0, 1].
        box: left, top, right, bottom, as fractions of the picture's width and height.
        color: its colour, where the observer was asked for it.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None

    @property
    def center(self) -> tuple[float, float]:
        """Of the box: x to the right, y down, in [0, 1]."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the box."""
        left, top, right, bottom = self.box
        return right - left, bottom - top


@dataclass(frozen=True)
class Observation:
    """All that was found in a picture; `background` and `style` are None where the observer cannot tell."""

    objects: tuple[Detection, ...]
    background: str | None = None
    style: str | None = None
