"""Row-major order of 4-bit codes, as most runtimes have it: two neighbours along K share a byte.

Legend: N output features, K input features, G groups along K.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.loaders.quantized.layer import bits


def pairs(nibbles: Tensor) -> Tensor:
    """Nibbles `[N, K]` to bytes `[N, K/2]`, with even k in the low half."""
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpairs(packed: Tensor) -> Tensor:
    """The inverse of `pairs`, of bytes of any 8-bit type."""
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def transposed(scales: Tensor) -> Tensor:
    """Scales `[N, G]` from or to `[G, N]`."""
    return bits(scales).t().contiguous().view(scales.dtype)


def swizzled(scales: Tensor) -> Tensor:
    """e4m3 scales `[N, G]` in the order of block-scaled matrix products, with rows padded to 128 and groups to 4."""
    rows, groups = scales.shape
    padded = F.pad(scales.view(torch.uint8), (0, -groups % 4, 0, -rows % 128))
    tiles = padded.view(-1, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).view(scales.dtype)


def unswizzled(scales: Tensor, rows: int, groups: int) -> Tensor:
    """The inverse of `swizzled`, without the padding."""
    high, wide = -(-rows // 128) * 128, -(-groups // 4) * 4
    tiles = scales.view(torch.uint8).reshape(high // 128, wide // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high, wide)[:rows, :groups].contiguous().view(scales.dtype)
