"""Exact tiling of the convolutional stages of DC-AE: the same result as without tiles, in a fraction of the memory.

Attention sees the whole image, so a tile processed alone differs in tone from its neighbors. But the stages next to
the pixels, which need nearly all of the memory, consist of convolutions and per-pixel norms, with a receptive field of
`halo`. So tiles are cut from the feature map between the two kinds of stages, with a halo that is dropped after the
shallow stages; the deep stages run on the whole image.

One unit is one pixel of that feature map, `2**num_shallow` pixels of the image wide.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor

from diffusers_sana.models.autoencoders.stage_config import StageConfig


# Each further stage doubles the halo in pixels and holds a quarter of the memory: beyond the third it does not pay.
MAX_SHALLOW_STAGES = 3

# Wraps the tiles of `map_tiles`, for the progress bar of a caller many calls away.
_progress: ContextVar[Callable[[Sequence[Any]], Iterable[Any]]] = ContextVar("progress", default=iter)


@dataclass(frozen=True)
class ShallowEnd:
    """The stages of one half that run in tiles.

    Attributes:
        num_stages: number of stages, counted from the pixels.
        halo: units of context that a tile needs on each side.
    """

    num_stages: int
    halo: int

    @property
    def unit(self) -> int:
        """Pixels of the image in one unit."""
        return 2**self.num_stages

    @property
    def margin(self) -> int:
        """Pixels of the image covered by the two halos of a tile."""
        return 2 * self.halo * self.unit

    def core(self, tile_size: int, stride: int) -> int:
        """Units that a tile of `tile_size` pixels, halo included, contributes; at most `stride` pixels.

        Raises:
            ValueError: if less than one unit is left.
        """
        core = min(tile_size - self.margin, stride) // self.unit
        if core < 1:
            raise ValueError(
                f"`tile_sample_min_height` and `tile_sample_min_width` must be at least {self.margin + self.unit} and "
                f"the strides {self.unit} pixels for this model, got {tile_size} and {stride}."
            )
        return core


def encoder_shallow_end(stages: Sequence[StageConfig]) -> ShallowEnd:
    """The front of an encoder, from `conv_in` to the last downsampler before the deep stages."""
    num_shallow = _num_shallow(stages)
    radius = 0  # pixels of the current grid, walking from the deep stages back to the image
    for stage in reversed(stages[:num_shallow]):
        if stage.num_layers > 0:
            radius = 2 * radius + 1 + 2 * stage.num_layers
    radius = radius + 1 if stages[0].num_layers > 0 else 2 * radius + 1
    return ShallowEnd(num_shallow, halo=math.ceil(radius / 2**num_shallow))


def decoder_shallow_end(stages: Sequence[StageConfig], interpolate: bool) -> ShallowEnd:
    """The tail of a decoder, from the first upsampler after the deep stages to `conv_out`.

    Args:
        interpolate: whether the upsamplers convolve after resizing, not before.
    """
    num_shallow = _num_shallow(stages)

    def before_upsampling(radius: int) -> int:
        return math.ceil((radius + 1) / 2) if interpolate else math.ceil(radius / 2) + 1

    radius = 1 if stages[0].num_layers > 0 else before_upsampling(0)
    for stage in stages[:num_shallow]:
        if stage.num_layers > 0:
            radius = before_upsampling(radius + 2 * stage.num_layers)
    return ShallowEnd(num_shallow, halo=radius)


def _num_shallow(stages: Sequence[StageConfig]) -> int:
    attention = [i for i, stage in enumerate(stages) if stage.block_type != "ResBlock" and stage.num_layers > 0]
    return min([MAX_SHALLOW_STAGES, len(stages) - 1, *attention])


@contextmanager
def tiles_shown_by(progress: Callable[[Sequence[Any]], Iterable[Any]]) -> Iterator[None]:
    """Within the block, tiling iterates over `progress(tiles)`, as over `tqdm(tiles)`."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def map_tiles(
    function: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    *,
    core: tuple[int, int],
    halo: int,
    unit_in: int,
    unit_out: int,
) -> Tensor:
    """`function(hidden_states)`, computed in tiles; exact if the receptive field of `function` is within `halo`.

    Args:
        function: `[B, C, h * unit_in, w * unit_in]` to `[B, C', h * unit_out, w * unit_out]` for any h and w.
        hidden_states: `[B, C, H * unit_in, W * unit_in]`.
        core: height and width, in units, of the contribution of a tile.
        halo: units of context on each side.
        unit_in, unit_out: width of a unit before and after `function`.

    Returns:
        `[B, C', H * unit_out, W * unit_out]`.
    """
    num_rows, num_columns = (size // unit_in for size in hidden_states.shape[-2:])
    output = None
    tiles = list(product(_spans(num_rows, core[0]), _spans(num_columns, core[1])))
    for (top, bottom), (left, right) in _progress.get()(tiles):
        # The halo ends at the image border, where the zero padding of the convolutions is the correct context.
        first_row, first_column = max(top - halo, 0), max(left - halo, 0)
        rows = slice(first_row * unit_in, (bottom + halo) * unit_in)
        columns = slice(first_column * unit_in, (right + halo) * unit_in)
        tile = function(hidden_states[..., rows, columns])
        if output is None:
            output = tile.new_empty(*tile.shape[:2], num_rows * unit_out, num_columns * unit_out)
        rows = slice((top - first_row) * unit_out, (bottom - first_row) * unit_out)
        columns = slice((left - first_column) * unit_out, (right - first_column) * unit_out)
        output[..., top * unit_out : bottom * unit_out, left * unit_out : right * unit_out] = tile[..., rows, columns]
    assert output is not None, "an image has at least one tile"
    return output


def _spans(length: int, core: int) -> Iterator[tuple[int, int]]:
    """Splits `length` into the fewest spans of at most `core`, of nearly equal length."""
    num_spans = math.ceil(length / core)
    for i in range(num_spans):
        yield i * length // num_spans, (i + 1) * length // num_spans
