"""Common functions of the kernels over rows."""

import triton
from torch import Tensor


# Programs of a backward pass that write a partial sum: about four per multiprocessor of the largest GPUs.
MAX_PARTIALS = 512


def row_blocks(channels: int) -> tuple[int, int]:
    """Rows and channels of a block that has whole rows: 4096 elements, 16 a thread of 8 warps."""
    block_c = triton.next_power_of_2(channels)
    return 4096 // block_c, block_c


def as_rows(x: Tensor) -> Tensor:
    """`[..., C]` as `[R, C]` with unit stride along C: a view where the strides allow, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def as_modulation(x: Tensor) -> tuple[Tensor, int]:
    """`[B or 1, 1, C]` with unit stride along C, and its stride over the batch: 0 where one row serves all images."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, 0 if x.shape[0] == 1 else x.stride(0)
