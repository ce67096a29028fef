"""Row-major order of 4-bit codes, as most runtimes have it: two neighbours along K share a byte.

Legend: N output features, K input features, G groups along K.
"""

import torch
from torch import Tensor

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
