"""LoRA, LoHa and LoKr, each also with a Tucker core, as the matrix D that they add to a weight.

    LoRA    B A
    LoHa    (A1 B1) * (A2 B2)      elementwise; arXiv 2108.06098. The rank is r * r
    LoKr    kron(W1, W2)           arXiv 2309.14859. kron(P1 Q1, P2 Q2) = kron(P1, P2) kron(Q1, Q2)

A Tucker core `[r, r, ...]` stands between the two matrices of a convolution whose kernel is larger than 1x1.

Where D has a small rank, it becomes the factors of a plain LoRA, exactly, and supports everything that LoRA does.
Otherwise it stays as it is: the Kronecker factors of LoKr, and the whole matrix of LoHa. The tensor names are those of
LyCORIS, which PEFT and trainers share.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


DOWN, MID, UP = "lora_A.weight", "lora_mid.weight", "lora_B.weight"
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
Matrix = dict[str, Tensor]


def lora_as_matrix(parts: Mapping[str, Tensor]) -> tuple[Matrix, int]:
    """`down` and `up` of a LoRA.

    Args:
        parts: `DOWN` `[r, in, ...]`, `UP` `[out, r, ...]`, and maybe `MID` `[r, r, ...]`.

    Returns:
        The factors and r, the rank of the scale.

    Raises:
        ValueError: a core that does not fit between them.
    """
    down, up = parts[DOWN], parts[UP]
    if MID in parts:
        core = parts[MID]
        if core.ndim < 3 or tuple(core.shape[:2]) != (up.shape[1], down.shape[0]):
            raise ValueError(f"the Tucker core must fit between the factors, got the shapes {_shapes(parts)}.")
        down = torch.einsum("ij...,jc->ic...", core.float(), down.flatten(1).float()).to(down.dtype)
    return {"down": down, "up": up}, down.shape[0]


def loha_as_matrix(parts: Mapping[str, Tensor]) -> tuple[Matrix, int]:
    """`down` and `up`, or `diff`, of a LoHa.

    Args:
        parts: the tensors of `LOHA`: `[out, r]`, `[r, in]`, twice; axes after the second are folded into it. With the
            cores `[r, r, ...]` they are `[r, out]`, `[r, in]`.

    Returns:
        The matrix, and r, the rank of its scale.

    Raises:
        ValueError: a tensor is missing, or the shapes are inconsistent.
    """
    dtype = parts[next(iter(parts))].dtype
    if "hada_t1" in parts or "hada_t2" in parts:
        first, second = (_with_core(parts, f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2))
        if first.shape != second.shape:
            raise ValueError(f"the factors of LoHa must have matching shapes, got {_shapes(parts)}.")
        return {"diff": (first * second).to(dtype)}, parts["hada_w1_b"].shape[0]
    up1, down1 = _pair(parts, "hada_w1_a", "hada_w1_b")
    up2, down2 = _pair(parts, "hada_w2_a", "hada_w2_b")
    if up1.shape[0] != up2.shape[0] or down1.shape[1] != down2.shape[1]:
        raise ValueError(f"the factors of LoHa must have matching shapes, got {_shapes(parts)}.")
    if is_small(up1.shape[1] * up2.shape[1], up1.shape[0], down1.shape[1]):
        up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
        down = (down1[:, None] * down2[None]).flatten(0, 1)
        return {"down": down.to(dtype), "up": up.to(dtype)}, down1.shape[0]
    return {"diff": ((up1 @ down1) * (up2 @ down2)).to(dtype)}, down1.shape[0]


def lokr_as_matrix(parts: Mapping[str, Tensor]) -> tuple[Matrix, int | None]:
    """`down` and `up`, or `kron_1` and `kron_2`, of a LoKr.

    Args:
        parts: `lokr_w1`, or `lokr_w1_a` and `lokr_w1_b`, whose product it is; `lokr_w2` likewise, maybe with the core
            `lokr_t2`, between `[r, out]` and `[r, in]`.

    Returns:
        The matrix, and the rank of its scale: None if both are full matrices, which have no scale.

    Raises:
        ValueError: a tensor is missing, or the shapes are inconsistent.
    """
    rank = None
    pairs, whole = [], []
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            whole.append(_flat(parts, name))
            pairs.append(_factors(whole[-1]))
        elif name == "lokr_w2" and "lokr_t2" in parts:
            whole.append(_with_core(parts, "lokr_t2", "lokr_w2_a", "lokr_w2_b").flatten(1).contiguous())
            pairs.append(_factors(whole[-1]))
            rank = parts["lokr_w2_b"].shape[0]
        else:
            up, down = _pair(parts, f"{name}_a", f"{name}_b")
            rank = down.shape[0]
            whole.append(up @ down)
            pairs.append((up, down) if rank < min(up.shape[0], down.shape[1]) else _factors(whole[-1]))
    (up1, down1), (up2, down2) = pairs
    dtype = next(iter(parts.values())).dtype
    outputs, inputs = up1.shape[0] * up2.shape[0], down1.shape[1] * down2.shape[1]
    if is_small(up1.shape[1] * up2.shape[1], outputs, inputs):
        return {"down": torch.kron(down1, down2).to(dtype), "up": torch.kron(up1, up2).to(dtype)}, rank
    return {"kron_1": whole[0].to(dtype), "kron_2": whole[1].to(dtype)}, rank


def is_small(rank: int, outputs: int, inputs: int) -> bool:
    """Whether two factors are no larger than the matrix that they give."""
    return rank * (outputs + inputs) <= outputs * inputs


def _with_core(parts: Mapping[str, Tensor], core: str, up: str, down: str) -> Tensor:
    """`[out, in, ...]` of a core `[r, r, ...]` between `[r, out]` and `[r, in]`."""
    for name in (core, up, down):
        if name not in parts:
            raise ValueError(f"the layer must have a tensor {name!r}, got {sorted(parts)}.")
    sides = parts[up].shape[0], parts[down].shape[0]
    if parts[core].ndim < 3 or tuple(parts[core].shape[:2]) != sides or parts[up].ndim != 2:
        raise ValueError(f"the Tucker core {core!r} must fit between the factors, got the shapes {_shapes(parts)}.")
    return torch.einsum("ij...,ip,jr->pr...", parts[core].float(), parts[up].float(), parts[down].flatten(1).float())


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
