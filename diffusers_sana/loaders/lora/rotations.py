"""The rotations of OFT and BOFT from what their writers store, as the blocks of `changes.py`.

A rotation is stored as a skew-symmetric matrix Q, whose Cayley transform it is. Three rules are in use:

    PEFT, OneTrainer (`oft_R.weight`)    the upper triangle of Q; (1 - Q)^-1 (1 + Q) as a series of a few terms by
                                         default. It turns the input; a OneTrainer convolution turns the other way
    PEFT (`boft_R`, `boft_s`)            X with Q = (X^T - X) / 2; butterfly factors over inputs, and scales of outputs
    LyCORIS (`oft_blocks`, `rescale`)    X with Q = X - X^T; turns the output. With 4 axes it is BOFT

arXiv 2306.07280 (OFT), 2311.06243 (BOFT), 2506.19847 (the series).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


OFT, SCALED = "oft_R.weight", "oft_R.scaled_oft"
BOFT, LENGTHS = "boft_R", "boft_s"
BLOCKS, RESCALE = "oft_blocks", "rescale"
ROTATIONS = (OFT, SCALED, BOFT, LENGTHS, BLOCKS, RESCALE)
TERMS = 5  # of the series, in PEFT by default and in OneTrainer always


def rotation_parts(
    parts: Mapping[str, Tensor], alpha: Tensor | None, config: Mapping[str, Any] | None, is_conv: bool
) -> dict[str, Tensor]:
    """The change of a layer with a rotation, as parts of `changes.py` in fp32.

    Args:
        parts: the tensors of `ROTATIONS` that the layer has.
        alpha: for LyCORIS, the bound of the rotation per output; 0 means none.
        config: PEFT's, if PEFT wrote the file.
        is_conv: whether the layer is a convolution.

    Raises:
        ValueError: shapes of no known rule.
    """
    wide = {name: tensor.float() for name, tensor in parts.items() if name != SCALED}
    if OFT in parts:
        return {"in_blocks": _of_triangles(wide[OFT], SCALED in parts, config, is_conv)}
    if BOFT in parts:
        found = {"in_blocks": _of_peft_butterfly(wide[BOFT])}
        return found | ({"out_gain": wide[LENGTHS].flatten() - 1} if LENGTHS in parts else {})
    if BLOCKS not in parts:
        raise ValueError(f"the layer must have {BLOCKS!r}, got {sorted(parts)}.")
    blocks = wide[BLOCKS]
    _check_square(BLOCKS, blocks, (3, 4))
    skew = blocks - blocks.transpose(-1, -2)
    # LyCORIS bounds the norm of the whole layer by alpha per output.
    bound = 0.0 if alpha is None else float(alpha) * blocks.shape[-3] * blocks.shape[-1]
    if 0 < bound < skew.norm():
        skew = skew * (bound / skew.norm())
    turn = _cayley(skew)  # (1 + Q) (1 - Q)^-1 - 1
    # Diagonal blocks multiply from the other side than butterfly factors.
    found = {"out_blocks": turn.transpose(-1, -2).contiguous() if blocks.ndim == 3 else turn}
    return found | ({"out_gain": wide[RESCALE].flatten() - 1} if RESCALE in parts else {})


def _of_triangles(triangles: Tensor, is_scaled: bool, config: Mapping[str, Any] | None, is_conv: bool) -> Tensor:
    """`[n, b (b - 1) / 2]` to `[n, b, b]`."""
    side = round((1 + (1 + 8 * triangles.shape[-1]) ** 0.5) / 2)
    if triangles.ndim != 2 or side * (side - 1) // 2 != triangles.shape[1]:
        raise ValueError(f"{OFT!r} must have the triangles of blocks, got the shape {list(triangles.shape)}.")
    if is_scaled:
        triangles = triangles / (2 * (side - 1) ** 0.5)
    skew = triangles.new_zeros(len(triangles), side, side)
    rows, columns = torch.triu_indices(side, side, 1)
    skew[:, rows, columns] = triangles
    skew = skew - skew.transpose(1, 2)
    fields = config or {}
    if not fields.get("use_cayley_neumann", True):
        return _cayley(-skew)
    terms = fields.get("num_cayley_neumann_terms", TERMS)
    # 1 + 2 Q + 2 Q^2 + ... + Q^last: PEFT counts no fewer than three powers from three terms on.
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    turn, power = torch.zeros_like(skew), skew
    for number in range(1, last + 1):
        turn = turn + power * (1 if number == last and terms > 2 else 2)
        power = power @ skew
    return turn.transpose(1, 2).contiguous() if is_conv and config is None else turn


def _of_peft_butterfly(values: Tensor) -> Tensor:
    """PEFT's factors `[m, n, b, b]` in the order of `changes.py`."""
    _check_square(BOFT, values, (4,))
    turn = _cayley(-0.5 * (values - values.transpose(-1, -2)))
    if len(turn) == 1:  # plain blocks
        return turn[0]
    # PEFT's blocks have b / 2 neighbours of one half first, then those of the other; ours have them in turns.
    order = torch.arange(turn.shape[-1]).unflatten(0, (2, -1)).t().flatten()
    return turn[..., order[:, None], order].contiguous()


def _cayley(skew: Tensor) -> Tensor:
    """(1 + Q) (1 - Q)^-1 - 1 = 2 Q (1 - Q)^-1, without cancellation."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(identity - skew, 2 * skew, left=False)


def _check_square(name: str, blocks: Tensor, axes: tuple[int, ...]) -> None:
    is_butterfly = blocks.ndim == 4 and (name == BLOCKS or len(blocks) > 1)
    if blocks.ndim not in axes or blocks.shape[-1] != blocks.shape[-2] or (is_butterfly and blocks.shape[-1] % 2):
        sides = "an even side" if is_butterfly else "equal sides"
        raise ValueError(f"{name!r} must have blocks with {sides}, got the shape {list(blocks.shape)}.")
