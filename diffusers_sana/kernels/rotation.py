"""Rotation of the input of quantized layers: a Hadamard matrix per group of channels (ConvRot, arXiv 2512.03673).

    x' = x R,    weight' = weight R,    x' @ weight'.T = x @ weight.T

We rotate groups of 64, those that share a scale in int4; other writers use other powers of 4, too. R spreads the
values of a group evenly over it, so that a single large one no longer decides how coarsely the others are rounded. It
is the regular Hadamard matrix, the Kronecker product of J / 2 - 1 with itself, where J is the 4x4 matrix of ones. It
is symmetric and its own inverse. All of its rows have the same sum, so the mean of a group is spread as well, which
the first row of other Hadamard matrices would collect.

A layer stores the size of its groups in int8: the scalar 64, or for another power of 4 a vector of its factors 4. So
the size is known by the shape, where the values are not: in compiled code and on the meta device.

Legend: K features, Kp = K padded.
"""

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import pad_features, padded


GROUP = 64
FACTOR = 4


def rotation_tensor(size: int = GROUP, device: torch.device | str | None = None) -> Tensor:
    """What a layer stores for groups of `size`, a power of 4.

    Raises:
        ValueError: another size.
    """
    num_factors = (size.bit_length() - 1) // 2
    if size != FACTOR**num_factors or num_factors == 0:
        raise ValueError(f"the size of rotated groups must be a power of {FACTOR}, got {size}.")
    if size == GROUP:
        return torch.tensor(GROUP, dtype=torch.int8, device=device)
    return torch.full((num_factors,), FACTOR, dtype=torch.int8, device=device)


def rotation_size(rotation: Tensor) -> int:
    """The size of the groups."""
    return GROUP if rotation.dim() == 0 else FACTOR ** rotation.shape[0]


def can_rotate(features: int, size: int) -> bool:
    """Whether padded features are a whole number of groups."""
    return padded(features) % size == 0


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """`x R`, `[..., K]` to `[..., Kp]`. Applied again it gives `x`, padded with zeros.

    Args:
        x: `[..., K]`, of which `can_rotate` is true.
        rotation: that of the layer.
    """
    num_factors = (rotation_size(rotation).bit_length() - 1) // 2
    groups = pad_features(x).unflatten(-1, (-1, *[FACTOR] * num_factors))
    for axis in range(-num_factors, 0):
        groups = groups.sum(axis, keepdim=True) * (2 / FACTOR) - groups
    return groups.flatten(-num_factors - 1)
