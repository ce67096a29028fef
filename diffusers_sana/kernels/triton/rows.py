"""Common functions of the kernels over rows."""

from torch import Tensor


# Programs of a backward pass that write a partial sum: about four per multiprocessor of the largest GPUs.
MAX_PARTIALS = 512


def as_rows(x: Tensor) -> Tensor:
    """`[..., C]` as `[R, C]` with unit stride along C: a view where the strides allow, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def as_modulation(x: Tensor) -> tuple[Tensor, int]:
    """`[B or 1, 1, C]` with unit stride along C, and its stride over the batch: 0 where one row serves all images."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, 0 if x.shape[0] == 1 else x.stride(0)
