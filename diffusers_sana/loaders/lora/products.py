"""LoHa and LoKr as LoRA: the same change of a weight as the product of two matrices.

    LoHa    (A1 B1) * (A2 B2)      elementwise; arXiv 2108.06098. The rank is r * r
    LoKr    kron(W1, W2)           arXiv 2309.14859. kron(P1 Q1, P2 Q2) = kron(P1, P2) kron(Q1, Q2)

The result is exact and supports everything that LoRA does, but its size grows with the rank: LoKr with full factors
has the full rank of the layer, and so twice its size. The tensor names are those of LyCORIS, which PEFT and trainers
share.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def loha_as_lora(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """LoRA factors of a LoHa.

    Args:
        parts: the tensors of `LOHA`: `[out, r]`, `[r, in]`, twice; axes after the second are folded into it.

    Returns:
        `[rank, in]`, `[out, rank]`, and r, the rank of its scale.

    Raises:
        ValueError: a tensor is missing, or the shapes are inconsistent.
    """
    up1, down1 = _pair(parts, "hada_w1_a", "hada_w1_b")
    up2, down2 = _pair(parts, "hada_w2_a", "hada_w2_b")
    if up1.shape[0] != up2.shape[0] or down1.shape[1] != down2.shape[1]:
        raise ValueError(f"the factors of LoHa must have matching shapes, got {_shapes(parts)}.")
    if up1.shape[1] * up2.shape[1] < min(up1.shape[0], down1.shape[1]):
        up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
        down = (down1[:, None] * down2[None]).flatten(0, 1)
    else:
        up, down = _factors((up1 @ down1) * (up2 @ down2))
    dtype = parts["hada_w1_a"].dtype
    return down.to(dtype), up.to(dtype), down1.shape[0]


def lokr_as_lora(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    """LoRA factors of a LoKr.

    Args:
        parts: `lokr_w1`, or `lokr_w1_a` and `lokr_w1_b`, whose product it is; `lokr_w2` likewise.

    Returns:
        `[rank, in]`, `[out, rank]`, and the rank of the scale: None if both are full matrices, which have no
        scale.

    Raises:
        ValueError: a tensor is missing, or the shapes are inconsistent.
    """
    rank = None
    pairs = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            pairs.append(_factors(_flat(parts, name)))
        else:
            up, down = _pair(parts, f"{name}_a", f"{name}_b")
            rank = down.shape[0]
            pairs.append((up, down) if rank < min(up.shape[0], down.shape[1]) else _factors(up @ down))
    (up1, down1), (up2, down2) = pairs
    dtype = next(iter(parts.values())).dtype
    return torch.kron(down1, down2).to(dtype), torch.kron(up1, up2).to(dtype), rank


def _factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as a product with the smaller identity."""
    rows, columns = matrix.shape
    if rows < columns:
        return torch.eye(rows, dtype=matrix.dtype), matrix
    return matrix, torch.eye(columns, dtype=matrix.dtype)


def _pair(parts: Mapping[str, Tensor], first: str, second: str) -> tuple[Tensor, Tensor]:
    up, down = _flat(parts, first), _flat(parts, second)
    if up.shape[1] != down.shape[0]:
        raise ValueError(f"{first!r} and {second!r} must have the same rank, got the shapes {_shapes(parts)}.")
    return up, down


def _flat(parts: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in parts:
        raise ValueError(f"the layer must have a tensor {name!r}, got {sorted(parts)}.")
    if parts[name].ndim < 2 or not parts[name].numel():
        raise ValueError(f"{name!r} must be a matrix, got the shapes {_shapes(parts)}.")
    return parts[name].flatten(1).float().contiguous()


def _shapes(parts: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in parts.items()}
