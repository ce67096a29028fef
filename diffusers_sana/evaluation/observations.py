"""What a detector or probe has found in an image, and what checks are made against."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Detection:
    """One object in an image.

    Attributes:
        label: its class.
        score: confidence, in [0, 1].
        box: left, top, right, bottom, as fractions of the image's width and height.
        color: its color; None if not asked for.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None

    @property
    def center(self) -> tuple[float, float]:
        """Center of the box, x to the right and y down, in [0, 1]."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the box."""
        left, top, right, bottom = self.box
        return right - left, bottom - top


@dataclass(frozen=True)
class Observation:
    """All that was found in an image; `background` and `style` are None if the network does not recognize them."""

    objects: tuple[Detection, ...]
    background: str | None = None
    style: str | None = None
