"""auto-round's MXFP4 form of Nunchaku files: FLUX in Nunchaku's names and tiles, scales that are powers of two.

Scales are bytes, exponent + 127, of groups of 32. They become NVFP4 layers without any error: two equal e4m3 scales of
groups of 16, relative to the largest exponent of the row. Source: auto_round/export/svdquant_mxfp4.py.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


GROUP = 32
BIAS = 127
TOP = 8  # the largest exponent of a scale in a row becomes 2^8, near the top of e4m3
SMALLEST = -9  # the smallest power of two in e4m3


def unpack_exponents(packed: Tensor) -> Tensor:
    """Exponents `[Np, Kp/32]` of packed bytes `[Kp/32, Np]`."""
    groups, rows = packed.shape
    tiles = packed.reshape(
        rows // 128, groups // 2, 8, 4, 4, 2
    )  # row tile, group pair, o % 8, o % 32 / 8, o / 32, group
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups).to(torch.int32) - BIAS


def read_scales(packed: Tensor, columns: int, name: str) -> tuple[Tensor, Tensor]:
    """e4m3 scales `[Np, Kp/16]` and fp32 row factors `[Np]` of packed bytes `[Kp/32, Np]`.

    Raises:
        ValueError: exponents of a row that are too far apart for e4m3.
    """
    groups = -(-columns // GROUP)  # the padding says nothing of the row
    exponents = unpack_exponents(packed)[:, :groups]
    largest = exponents.amax(1, keepdim=True)
    relative = exponents - largest + TOP
    if (relative < SMALLEST).any():
        span = int((largest - exponents).max())
        raise ValueError(
            f"{name!r} has two MXFP4 scales in one row that differ by 2^{span}; NVFP4 has room for 2^{TOP - SMALLEST}."
        )
    scales = torch.exp2(F.pad(relative, (0, len(packed) - groups)).float()).to(torch.float8_e4m3fn)
    scales = scales.view(torch.uint8).repeat_interleave(2, 1).view(torch.float8_e4m3fn)
    return scales, torch.exp2((largest[:, 0] - TOP).float())
