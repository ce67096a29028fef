"""Nunchaku's layouts as index formulas: the address of every element, written out, one formula a layout."""

import torch
from torch import Tensor


def ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows)[:, None], torch.arange(columns)[None]


def codes_address(n: Tensor, k: Tensor, padded_columns: int) -> tuple[Tensor, Tensor]:
    """The 32-bit word of a 4-bit code and the bit in it at which the code begins."""
    tile_n, pack, half_n, lane = n // 128, n % 128 // 16, n % 16 // 8, n % 8
    tile_k, half_k, quarter, element = k // 64, k % 64 // 32, k % 32 // 8, k % 8
    word = (((tile_n * (padded_columns // 64) + tile_k) * 8 + pack) * 8 + lane) * 4 + quarter
    return (word * 2 + half_n) * 2 + half_k, 4 * element


def scales_address(n: Tensor, g: Tensor, groups: int) -> Tensor:
    o = n % 128
    return ((n // 128 * groups + g) * 8 + o // 16) * 16 + o % 8 // 2 * 4 + o % 16 // 8 * 2 + o % 2


def micro_scales_address(n: Tensor, g: Tensor, groups: int) -> Tensor:
    o = n % 128
    return (((n // 128 * (groups // 4) + g // 4) * 8 + o % 8) * 4 + o % 32 // 8) * 16 + o // 32 * 4 + g % 4


def down_address(r: Tensor, k: Tensor, rank: int) -> Tensor:
    tile = (k // 16 * (rank // 16) + r // 16) * 8 + r % 8
    return (((tile * 4 + k % 8 // 2) * 2 + r % 16 // 8) * 2 + k % 16 // 8) * 2 + k % 2


def up_address(n: Tensor, r: Tensor, rank: int) -> Tensor:
    tile = (n // 16 * (rank // 16) + r // 16) * 8 + n % 8
    return (((tile * 4 + r % 8 // 2) * 2 + n % 16 // 8) * 2 + r % 16 // 8) * 2 + r % 2


def awq_address(n: Tensor, k: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The 16-bit word of a code and the bit in it at which the code begins."""
    word = (n // 4 * (columns // 64) + k // 64) * 64 + n % 4 * 16 + k % 64 // 32 * 8 + k % 8
    return word, 4 * (k % 32 // 8)


def pad(matrix: Tensor, rows: int, columns: int, fill: float) -> Tensor:
    """Files may hold anything in the padding; the tests fill it with numbers that would show."""
    out = torch.full((rows, columns), fill, dtype=matrix.dtype)
    out[: matrix.shape[0], : matrix.shape[1]] = matrix
    return out


def _scatter(values: Tensor, address: Tensor) -> Tensor:
    out = torch.empty(values.numel(), dtype=values.dtype)
    out[address.expand(values.shape).flatten()] = values.flatten()
    return out


def write_codes(nibbles: Tensor) -> Tensor:
    nibbles = pad(nibbles, ceil(nibbles.shape[0], 128), ceil(nibbles.shape[1], 128), 0)
    word, bit = codes_address(*grid(*nibbles.shape), nibbles.shape[1])
    return _bytes(nibbles, word * 8 + bit // 4).view(torch.int8).reshape(nibbles.shape[0], -1)


def write_awq(nibbles: Tensor) -> Tensor:
    word, bit = awq_address(*grid(*nibbles.shape), nibbles.shape[1])
    packed = _bytes(nibbles, word * 4 + bit // 4).view(torch.int32)
    return packed.reshape(nibbles.shape[0] // 4, nibbles.shape[1] // 2)


def _bytes(nibbles: Tensor, position: Tensor) -> Tensor:
    """Nibble number `position` of memory: even ones are the low halves of bytes."""
    flat = _scatter(nibbles, position)
    return flat[0::2] | flat[1::2] << 4


def write_scales(scales: Tensor, fill: float = 0) -> Tensor:
    scales = pad(scales, ceil(scales.shape[0], 128), scales.shape[1], fill)
    return _scatter(scales, scales_address(*grid(*scales.shape), scales.shape[1])).reshape(scales.shape[1], -1)


def write_vector(vector: Tensor, fill: float = 0) -> Tensor:
    return write_scales(vector[:, None], fill).flatten()


def write_micro_scales(scales: Tensor, fill: float = 0) -> Tensor:
    scales = pad(scales.float(), ceil(scales.shape[0], 128), ceil(scales.shape[1], 8), fill).to(torch.float8_e4m3fn)
    address = micro_scales_address(*grid(*scales.shape), scales.shape[1])
    packed = _scatter(scales.view(torch.uint8), address).view(torch.float8_e4m3fn)
    return packed.reshape(scales.shape[1], scales.shape[0])


def write_down(down: Tensor, fill: float = 0) -> Tensor:
    padded = pad(down, ceil(down.shape[0], 16), ceil(down.shape[1], 128), fill)
    padded[down.shape[0] :] = 0  # only what multiplies true features may be anything
    return _scatter(padded, down_address(*grid(*padded.shape), padded.shape[0])).reshape(padded.shape[1], -1)


def write_up(up: Tensor, fill: float = 0) -> Tensor:
    padded = pad(up, ceil(up.shape[0], 128), ceil(up.shape[1], 16), fill)
    padded[:, up.shape[1] :] = 0
    return _scatter(padded, up_address(*grid(*padded.shape), padded.shape[1])).reshape(padded.shape)
