"""Conversion to and from the memory order of Nunchaku's tensors, that of the fragments of a matrix instruction.

Every layout factors the rows and columns of a matrix and permutes the factors, so packing is a reshape, a permutation
and a reshape, and unpacking the inverse. The shapes of packed tensors in files are nominal: only the number of
elements matters. Tiles are padded: scales and what kernels divide by with ones, everything else with zeros. `unpack_*`
returns the padding as well.

Legend: N output features, K input features, r rank, G groups along K; Np, Kp, rp, Gp are those of the file.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


TILE = 128  # N and K are padded to multiples of it
RANK_TILE = 16
AWQ_GROUP = 64


class _Layout(NamedTuple):
    """The order of a matrix `[R, C]` in memory.

    Attributes:
        rows, columns: factors of a tile's sides, outermost first; a tile index comes before each.
        order: of the axes (row tile, *rows, column tile, *columns) in memory, outermost first.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]

    def pack(self, matrix: Tensor) -> Tensor:
        """`[R, C]`, multiples of the tile, to a vector of R C elements."""
        rows, columns = len(matrix) // prod(self.rows), matrix.shape[1] // prod(self.columns)
        return matrix.reshape(rows, *self.rows, columns, *self.columns).permute(self.order).flatten()

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """R C elements in any shape to `[R, C]`."""
        axes = (rows // prod(self.rows), *self.rows, columns // prod(self.columns), *self.columns)
        inverse = [self.order.index(axis) for axis in range(len(axes))]
        return packed.reshape([axes[axis] for axis in self.order]).permute(inverse).reshape(rows, columns)


_CODES = _Layout((8, 2, 8), (2, 4, 8), (0, 4, 1, 3, 6, 2, 5, 7))
_SCALES = _Layout((8, 2, 4, 2), (), (0, 5, 1, 3, 2, 4))
_MICRO_SCALES = _Layout((4, 4, 8), (4,), (0, 4, 3, 2, 1, 5))
_DOWN = _Layout((2, 8), (2, 4, 2), (3, 0, 2, 5, 1, 4, 6))
_UP = _Layout((2, 8), (2, 4, 2), (0, 3, 2, 5, 1, 4, 6))
_AWQ = _Layout((4,), (2, 4, 8), (0, 2, 1, 3, 5, 4))
_E4M3_ONE = 0x38  # the byte of 1 in e4m3


def pack_codes(nibbles: Tensor) -> Tensor:
    """4-bit codes `[N, K]`, uint8 0..15, to int8 `[Np, Kp/2]`."""
    nibbles = _padded(nibbles, TILE, TILE)
    return _join(_CODES.pack(nibbles)).view(torch.int8).reshape(nibbles.shape[0], -1)


def unpack_codes(packed: Tensor) -> Tensor:
    """int8 `[Np, Kp/2]` to 4-bit codes `[Np, Kp]`, uint8 0..15."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    _check("qweight", packed, 0, TILE)
    _check("qweight", packed, 1, TILE // 4)
    return _CODES.unpack(_cut(packed), rows, columns)


def pack_scales(scales: Tensor) -> Tensor:
    """16-bit scales `[N, G]` of groups of 64 to `[Gp, Np]`."""
    scales = _padded(scales, TILE, TILE // 64, value=1)
    return _SCALES.pack(scales).reshape(scales.shape[1], -1)


def unpack_scales(packed: Tensor) -> Tensor:
    """16-bit scales `[G, Np]` to `[Np, G]`."""
    _check("wscales", packed, 1, TILE)
    return _SCALES.unpack(packed, packed.shape[1], packed.shape[0])


def pack_vector(vector: Tensor, padding: float = 0) -> Tensor:
    """A 16-bit vector `[N]` to `[Np]`, with zeros for a bias, ones for smoothing factors and row scales."""
    return _SCALES.pack(_padded(vector[:, None], TILE, 1, value=padding))


def unpack_vector(packed: Tensor) -> Tensor:
    """A 16-bit vector `[Np]` in natural order."""
    _check("a vector", packed, 0, TILE)
    return unpack_scales(packed[None]).flatten()


def pack_micro_scales(scales: Tensor) -> Tensor:
    """e4m3 scales `[N, G]` of groups of 16 to `[Gp, Np]`."""
    padded = _padded(scales.view(torch.uint8), TILE, TILE // 16, value=_E4M3_ONE)
    return _MICRO_SCALES.pack(padded).view(scales.dtype).reshape(padded.shape[1], padded.shape[0])


def unpack_micro_scales(packed: Tensor) -> Tensor:
    """e4m3 scales `[Gp, Np]` to `[Np, Gp]`."""
    _check("wscales", packed, 0, 4)
    _check("wscales", packed, 1, TILE)
    return _MICRO_SCALES.unpack(packed.view(torch.uint8), packed.shape[1], packed.shape[0]).view(packed.dtype)


def pack_down(down: Tensor) -> Tensor:
    """The down projection `[r, K]` to `[Kp, rp]`."""
    down = _padded(down, RANK_TILE, TILE)
    return _DOWN.pack(down).reshape(down.shape[1], down.shape[0])


def unpack_down(packed: Tensor) -> Tensor:
    """The down projection `[Kp, rp]` to `[rp, Kp]`."""
    _check("lora_down", packed, 0, RANK_TILE)
    _check("lora_down", packed, 1, RANK_TILE)
    return _DOWN.unpack(packed, packed.shape[1], packed.shape[0])


def pack_up(up: Tensor) -> Tensor:
    """The up projection `[N, r]` to `[Np, rp]`."""
    up = _padded(up, TILE, RANK_TILE)
    return _UP.pack(up).reshape(up.shape)


def unpack_up(packed: Tensor) -> Tensor:
    """The up projection `[Np, rp]` in natural order."""
    _check("lora_up", packed, 0, RANK_TILE)
    _check("lora_up", packed, 1, RANK_TILE)
    return _UP.unpack(packed, packed.shape[0], packed.shape[1])


def pack_awq(nibbles: Tensor) -> Tensor:
    """Codes of a weight-only layer, `[N, K]` uint8 0..15 with N a multiple of 4 and K of 64, to int32 `[N/4, K/2]`."""
    rows, columns = nibbles.shape
    _check("codes", nibbles, 0, 4)
    _check("codes", nibbles, 1, AWQ_GROUP)
    return _join(_AWQ.pack(nibbles)).view(torch.int32).reshape(rows // 4, columns // 2)


def unpack_awq(packed: Tensor) -> Tensor:
    """int32 `[N/4, K/2]` to codes `[N, K]`, uint8 0..15."""
    rows, columns = 4 * packed.shape[0], 2 * packed.shape[1]
    _check("qweight", packed, 1, AWQ_GROUP // 2)
    return _AWQ.unpack(_cut(packed), rows, columns)


def _padded(matrix: Tensor, rows: int, columns: int, value: float = 0) -> Tensor:
    """Padding at the bottom and right, to multiples of `rows` and `columns`."""
    return F.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows), value=value)


def _join(nibbles: Tensor) -> Tensor:
    """Pairs of nibbles, low nibble first, to bytes."""
    return nibbles[0::2] | (nibbles[1::2] << 4)


def _cut(packed: Tensor) -> Tensor:
    """The nibbles of an integer tensor, in little-endian memory order."""
    packed = packed.contiguous().view(torch.uint8).flatten()
    return torch.stack([packed & 15, packed >> 4], dim=-1)


def _check(name: str, tensor: Tensor, axis: int, multiple: int) -> None:
    if tensor.shape[axis] % multiple:
        raise ValueError(
            f"axis {axis} of `{name}` must be a multiple of {multiple}, got shape {tuple(tensor.shape)}. "
            "The tensor is not in Nunchaku's layout."
        )
