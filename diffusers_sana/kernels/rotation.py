"""Rotation of the input of 4-bit layers: a Hadamard matrix for each group of 64 channels (ConvRot, arXiv 2512.03673).

    x' = x R,    weight' = weight R,    x' @ weight'.T = x @ weight.T

The groups are those that share a scale in int4. R spreads the values of a group evenly over it, so that a single large
one no longer decides how coarsely the others are rounded. It is the regular Hadamard matrix, the triple Kronecker
product of J / 2 - 1 with the 4x4 matrix J of ones. It is symmetric and its own inverse, and all of its rows have the
same sum, so the mean of a group is spread as well, which the first row of other Hadamard matrices would collect.

Legend: K features, Kp = K padded.
"""

from torch import Tensor

from diffusers_sana.kernels.low_bit import pad_features


GROUP = 64
FACTOR = 4  # GROUP is its third power


def rotate(x: Tensor) -> Tensor:
    """`x R`, `[..., K]` to `[..., Kp]`. Applied again it gives `x`, padded with zeros."""
    groups = pad_features(x).unflatten(-1, (-1, FACTOR, FACTOR, FACTOR))
    for axis in (-1, -2, -3):
        groups = groups.sum(axis, keepdim=True) * (2 / FACTOR) - groups
    return groups.flatten(-4)
