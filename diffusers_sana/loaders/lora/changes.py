"""Changes of a weight that are no small product of two matrices: OFT, BOFT, DoRA over inputs, LoKr, whole matrices.

All of them are one expression of a weight W, in which every part is missing or small:

    W' = (1 + O) (W + D) (1 + J)

    D   a matrix: `diff`; or `kron_1` and `kron_2`, its Kronecker factors; or `up @ down`
    J   over inputs: `in_gain`, a diagonal; or `in_blocks`, blocks of a rotation minus the identity
    O   over outputs: `out_gain`, `out_blocks` likewise, the blocks first

So the change of the output for an input x, computed beside a layer in any precision, needs the layer's own product
twice at most, and subtracts no large numbers from each other:

    u = W (J x) + D (x + J x)        change = u + O (W x + u)

`bias` is added to the output. `in_magnitude` and `out_magnitude` are the lengths of columns and rows of W' in DoRA
(arXiv 2402.09353). They become gains once the weight is known, see `with_gains`.

Blocks `[n, b, b]` are those of a block-diagonal matrix, with n = 1 if all are equal. Blocks `[m, n, b, b]` are those
of m butterfly factors (BOFT, arXiv 2311.06243), the first one applied first: factor i mixes pairs of elements at the
distance `2**i * b / 2`. For inputs, blocks are those of the matrix R in W'^T = R W^T.

Legend: N outputs, K inputs, including the positions of a kernel.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


CHANGE = "lora_change."  # before the parts in the keys of files
PARTS_OF_CHANGE = (
    "diff",
    "kron_1",
    "kron_2",
    "down",
    "up",
    "in_gain",
    "in_blocks",
    "in_magnitude",
    "out_gain",
    "out_blocks",
    "out_magnitude",
    "bias",
)
Parts = Mapping[str, Tensor]


def output_change(parts: Parts, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    """What a change adds to the output of a layer.

    Args:
        parts: of the change, with gains instead of magnitudes.
        x: `[..., K]`.
        base: the layer without its bias, `[..., K]` to `[..., N]`.

    Returns:
        `[..., N]`.
    """
    change: Tensor | None = None
    inside = x
    if "in_gain" in parts or "in_blocks" in parts:
        small = x * parts["in_gain"] if "in_gain" in parts else _turned(x, parts["in_blocks"], True)
        change, inside = base(small).to(x.dtype), x + small
    if has_matrix(parts):
        product = _product(parts, inside)
        change = product if change is None else change + product
    if "out_gain" in parts or "out_blocks" in parts:
        out = base(x).to(x.dtype)
        outer = _outer(parts, out if change is None else out + change)
        change = outer if change is None else change + outer
    if "bias" in parts:
        change = parts["bias"] if change is None else change + parts["bias"]
    assert change is not None, "a change has at least one part"
    return change


def weight_change(parts: Parts, weight: Tensor) -> Tensor:
    """W' - W in fp32, for a weight `[N, ...]` of the same shape; without `bias`."""
    flat = weight.flatten(1).float()
    wide = {name: tensor.float() for name, tensor in parts.items()}
    change = torch.zeros_like(flat)
    inside = flat
    if has_matrix(parts):
        change = matrix(wide)
        inside = flat + change
    if "in_gain" in parts:
        change = change + inside * _per_position(wide["in_gain"], flat.shape[1])
    elif "in_blocks" in parts:
        change = change + _turned(inside, wide["in_blocks"])
    if "out_gain" in parts or "out_blocks" in parts:
        change = change + _outer(wide, (flat + change).t()).t()
    return change.reshape(weight.shape)


def with_gains(parts: Parts, weight: Tensor) -> dict[str, Tensor]:
    """The parts of a change of a known weight: magnitudes become gains relative to the lengths in W + D.

    Raises:
        ValueError: a column or row of W + D is zero, so that it has no direction.
    """
    found = dict(parts)
    for axis, name in (("in", "in_magnitude"), ("out", "out_magnitude")):
        if name not in found:
            continue
        changed = weight.float()
        if has_matrix(parts):
            changed = changed + matrix({part: x.float() for part, x in parts.items()}).reshape(weight.shape)
        lengths = changed.flatten(1).norm(dim=1) if axis == "out" else changed.transpose(0, 1).flatten(1).norm(dim=1)
        if not bool((lengths > 0).all()):
            raise ValueError(f"{name!r} of DoRA needs a direction, but a row or column of the changed weight is zero.")
        found[f"{axis}_gain"] = found.pop(name).flatten().float() / lengths - 1
    return found


def has_matrix(parts: Parts) -> bool:
    """Whether a change has the part D."""
    return any(name in parts for name in ("diff", "kron_1", "down"))


def matrix(parts: Parts) -> Tensor:
    """D, `[N, K]`."""
    if "diff" in parts:
        return parts["diff"].flatten(1)
    if "kron_1" in parts:
        return torch.kron(parts["kron_1"].contiguous(), parts["kron_2"].flatten(1).contiguous())
    return parts["up"].flatten(1) @ parts["down"].flatten(1)


def sizes(parts: Parts) -> tuple[set[int], set[int]]:
    """Which N and which K the parts call for; several are a contradiction. Shared blocks call for none."""
    outputs, inputs = set(), set()
    for name, tensor in parts.items():
        if name in ("out_gain", "out_magnitude", "bias"):
            outputs.add(tensor.numel())
        elif name in ("in_gain", "in_magnitude"):
            inputs.add(tensor.numel())
        elif name.endswith("_blocks") and tensor.shape[-3] > 1:
            (inputs if name == "in_blocks" else outputs).add(tensor.shape[-3] * tensor.shape[-1])
    if has_matrix(parts):
        shapes = {name: (x.shape[0], x[0].numel()) for name, x in parts.items() if name in PARTS_OF_CHANGE[:5]}
        if "kron_1" in parts:
            (rows, columns), (others, more) = shapes["kron_1"], shapes["kron_2"]
            outputs.add(rows * others)
            inputs.add(columns * more)
        else:
            outputs.add(shapes["diff" if "diff" in parts else "up"][0])
            inputs.add(shapes["diff" if "diff" in parts else "down"][1])
    return outputs, inputs


def split_outputs(parts: Parts, ratio: tuple[int, ...]) -> tuple[dict[str, Tensor], ...]:
    """A change of a fused layer as one of each of its layers, whose outputs have a `ratio`.

    Raises:
        ValueError: the parts cannot be separated.
    """
    plain = {"diff": matrix(parts), **parts} if "kron_1" in parts else dict(parts)
    plain.pop("kron_1", None), plain.pop("kron_2", None)
    if "in_magnitude" in parts:
        raise ValueError(
            "DoRA over the inputs of a fused layer has lengths of all its parts together. Train it over outputs, or "
            "on the separate layers."
        )
    pieces: list[dict[str, Tensor]] = [{} for _ in ratio]
    for name, tensor in plain.items():
        is_butterfly = name == "out_blocks" and tensor.ndim == 4
        is_shared = name == "out_blocks" and tensor.shape[-3] == 1
        if name in ("down", "in_gain", "in_blocks") or is_shared:
            chunks = (tensor,) * len(ratio)
        elif is_butterfly:
            raise ValueError(f"{name!r} must not mix the outputs of separate layers, as BOFT does.")
        else:
            chunks = pieces_of(tensor, ratio, name)
        for piece, chunk in zip(pieces, chunks, strict=True):
            piece[name] = chunk
    return tuple(pieces)


def pieces_of(tensor: Tensor, ratio: tuple[int, ...], name: str) -> tuple[Tensor, ...]:
    """A tensor in pieces along its first axis, whose sizes have a ratio.

    Raises:
        ValueError: naming the tensor, which has no such pieces.
    """
    whole = sum(ratio)
    if not tensor.ndim or tensor.shape[0] % whole:
        what = f"{whole} equal parts" if set(ratio) == {1} else f"parts in the ratio {':'.join(map(str, ratio))}"
        raise ValueError(f"{name!r} must have {what}, got the shape {list(tensor.shape)}.")
    return tuple(piece.contiguous() for piece in tensor.split([tensor.shape[0] // whole * part for part in ratio]))


def _outer(parts: Parts, out: Tensor) -> Tensor:
    """O times an output."""
    change = _turned(out, parts["out_blocks"]) if "out_blocks" in parts else torch.zeros_like(out)
    return change + (out + change) * parts["out_gain"] if "out_gain" in parts else change


def _product(parts: Parts, x: Tensor) -> Tensor:
    """D times x, `[..., K]` to `[..., N]`."""
    if "kron_1" in parts:
        first, second = parts["kron_1"], parts["kron_2"].flatten(1)
        pairs = x.unflatten(-1, (first.shape[1], second.shape[1]))
        return torch.einsum("...bd,ab,cd->...ac", pairs, first, second).flatten(-2)
    if "diff" in parts:
        return x @ parts["diff"].flatten(1).t()
    return (x @ parts["down"].flatten(1).t()) @ parts["up"].flatten(1).t()


def _turned(x: Tensor, blocks: Tensor, transposed: bool = False) -> Tensor:
    """A rotation minus the identity, or its transpose minus the identity, times x `[..., K]`."""
    if blocks.ndim == 3:
        return _by_blocks(x, blocks, transposed)
    change = torch.zeros_like(x)
    for index in reversed(range(len(blocks))) if transposed else range(len(blocks)):
        distance = 2**index * blocks.shape[-1] // 2
        pairs = (x + change).unflatten(-1, (-1, 2, distance)).transpose(-1, -2).flatten(-3)
        mixed = _by_blocks(pairs, blocks[index], transposed)
        change = change + mixed.unflatten(-1, (-1, distance, 2)).transpose(-1, -2).flatten(-3)
    return change


def _by_blocks(x: Tensor, blocks: Tensor, transposed: bool) -> Tensor:
    rule = "nji,...nj->...ni" if transposed else "nij,...nj->...ni"
    return torch.einsum(rule, blocks, x.unflatten(-1, (-1, blocks.shape[-1]))).flatten(-2)


def _per_position(gain: Tensor, inputs: int) -> Tensor:
    """A gain per channel as one per position of the kernel."""
    return gain.repeat_interleave(inputs // gain.numel())
