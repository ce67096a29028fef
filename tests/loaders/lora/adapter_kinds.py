"""Adapters of every kind for one layer, as their writers store them, and the weight that their writers' rules give.

The rules are written out here once more, from the layers of the writers: LyCORIS (`lycoris/modules`), OneTrainer
(`LoRAModule.py`, `oft_utils.py`). Files of PEFT are written by PEFT itself, in `test_changes.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Kind:
    """Of one adapter.

    Attributes:
        make: from a weight: the tensors by the endings of their keys, and the changed weight.
        is_low_rank: whether it becomes a plain LoRA.
    """

    make: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
    is_low_rank: bool = False


def small(*shape: int, scale: float = 0.1) -> Tensor:
    return torch.randn(*shape) * scale


def lora(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    outputs, inputs = weight.shape[0], weight[0].numel()
    down, up = small(3, inputs), small(outputs, 3, scale=0.05)
    tensors = {
        "lora_down.weight": down.reshape(3, *weight.shape[1:]),
        "lora_up.weight": up,
        "alpha": torch.tensor(6.0),
    }
    tensors["lora_up.weight"] = up.reshape(outputs, 3, *[1] * (weight.ndim - 2))
    return tensors, weight + (2 * up @ down).reshape(weight.shape)


def tucker_lora(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """LyCORIS LoCon with a core."""
    outputs, inputs, *kernel = weight.shape
    down, core, up = small(3, inputs), small(3, 3, *kernel, scale=0.5), small(outputs, 3)
    tensors = {
        "lora_down.weight": down[..., None, None],
        "lora_mid.weight": core,
        "lora_up.weight": up[..., None, None],
        "alpha": torch.tensor(6.0),
    }
    return tensors, weight + 2 * torch.einsum("ijhw,oi,jc->ochw", core, up, down)


def loha(rank: int, is_tucker: bool = False) -> Kind:
    def make(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        outputs, inputs, *kernel = weight.shape
        tensors, product = {"alpha": torch.tensor(2.0 * rank)}, torch.tensor(2.0)
        for index in (1, 2):
            if is_tucker:
                up, down = small(rank, outputs, scale=0.3), small(rank, inputs, scale=0.3)
                core = small(rank, rank, *kernel, scale=0.5)
                tensors[f"hada_t{index}"] = core
                product = product * torch.einsum("ijhw,io,jc->ochw", core, up, down)
            else:
                up, down = small(outputs, rank, scale=0.2), small(rank, weight[0].numel(), scale=0.2)
                product = product * (up @ down)
            tensors |= {f"hada_w{index}_a": up, f"hada_w{index}_b": down}
        return tensors, weight + product.reshape(weight.shape)

    return Kind(make, is_low_rank=rank < 4 and not is_tucker)


def lokr(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Of two whole matrices, SimpleTuner's default; LyCORIS then has no scale."""
    outputs, inputs, *kernel = weight.shape
    first, second = small(4, 2), small(outputs // 4, inputs // 2, *kernel)
    product = torch.kron(first, second.flatten(1)).reshape(weight.shape)
    return {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(3.0)}, weight + product


def lokr_of_low_rank(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    outputs, inputs = weight.shape[0], weight[0].numel()
    first, up, down = small(2, 2), small(outputs // 2, 2, scale=0.3), small(2, inputs // 2, scale=0.3)
    tensors = {"lokr_w1": first, "lokr_w2_a": up, "lokr_w2_b": down, "alpha": torch.tensor(6.0)}
    return tensors, weight + 3 * torch.kron(first, up @ down).reshape(weight.shape)


def tucker_lokr(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """OneTrainer's and LyCORIS'."""
    outputs, inputs, *kernel = weight.shape
    first, core = small(4, 2), small(2, 2, *kernel, scale=0.5)
    up, down = small(2, outputs // 4), small(2, inputs // 2)
    second = torch.einsum("ijhw,ip,jr->prhw", core, up, down)
    tensors = {"lokr_w1": first, "lokr_t2": core, "lokr_w2_a": up, "lokr_w2_b": down, "alpha": torch.tensor(6.0)}
    return tensors, weight + 3 * torch.kron(first, second.flatten(1)).reshape(weight.shape)


def dora(inner: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]], axis: str) -> Kind:
    """The changed weight with rows ("out") or columns ("in") of lengths from the file."""

    def make(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, changed = inner(weight)
        dims = [*range(1, weight.ndim)] if axis == "out" else [0, *range(2, weight.ndim)]
        lengths = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
        magnitude = lengths * (1 + small(*lengths.shape))
        return tensors | {"dora_scale": magnitude}, magnitude * changed / torch.linalg.vector_norm(
            changed, dim=dims, keepdim=True
        )

    return Kind(make, is_low_rank=axis == "out" and inner in (lora, tucker_lora))


def full(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """With few strong directions, as trained weights have."""
    inputs = weight[0].numel()
    strength = 0.1 / torch.arange(1, inputs + 1)
    change = (torch.randn(len(weight), inputs) * strength @ torch.randn(inputs, inputs)).reshape(weight.shape) * 0.3
    return {"diff": change}, weight + change


def turns(skew: Tensor) -> Tensor:
    """(1 + Q) (1 - Q)^-1"""
    identity = torch.eye(skew.shape[-1])
    return (identity + skew) @ torch.linalg.inv(identity - skew)


def diagonal_oft(rescale: bool = False, bound: float = 0.0) -> Kind:
    """LyCORIS: block k of the output is R_k^T times that of the weight."""

    def make(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        blocks = small(len(weight) // 8, 8, 8, scale=0.05)
        skew = blocks - blocks.transpose(1, 2)
        if bound and skew.norm() > bound * len(weight):
            skew = skew * bound * len(weight) / skew.norm()
        changed = torch.einsum("knm,kn...->km...", turns(skew), weight.unflatten(0, (-1, 8))).flatten(0, 1)
        tensors = {"oft_blocks": blocks, "alpha": torch.tensor(bound)}
        if rescale:
            tensors["rescale"] = 1 + small(len(weight), *[1] * (weight.ndim - 1))
            changed = tensors["rescale"] * changed
        return tensors, changed

    return Kind(make)


def boft(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """LyCORIS: factors that mix the output in ever larger groups."""
    blocks = small(3, len(weight) // 8, 8, 8, scale=0.03)
    changed = weight.flatten(1)
    for index, turn in enumerate(turns(blocks - blocks.transpose(2, 3))):
        half = 4 * 2**index
        order = torch.arange(len(weight)).reshape(-1, 2, half).transpose(1, 2).flatten()
        mixed = torch.cat([block @ rows for block, rows in zip(turn, changed[order].split(8), strict=True)])
        changed = torch.empty_like(changed).index_copy(0, order, mixed)
    return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, changed.reshape(weight.shape)


def oft(is_scaled: bool = False, is_shared: bool = False) -> Kind:
    """OneTrainer: blocks of the inputs; the weight is turned one way in linear layers, the other in convolutions."""

    def make(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        side, flat = 8, weight.flatten(1)
        triangles = small(1 if is_shared else flat.shape[1] // side, side * (side - 1) // 2, scale=0.05)
        used = triangles / (2 * (side - 1) ** 0.5) if is_scaled else triangles
        skew = torch.zeros(len(used), side, side)
        skew[:, *torch.triu_indices(side, side, 1)] = used
        skew = skew - skew.transpose(1, 2)
        turn = torch.eye(side) + 2 * skew + 2 * skew @ skew + 2 * skew @ skew @ skew + skew @ skew @ skew @ skew
        turn = torch.block_diag(*turn.expand(flat.shape[1] // side, side, side))
        tensors = {"oft_R.weight": triangles} | ({"oft_R.scaled_oft": torch.tensor(True)} if is_scaled else {})
        return tensors, (flat @ turn if weight.ndim == 4 else flat @ turn.t()).reshape(weight.shape)

    return Kind(make)


KINDS = {
    "LoRA": Kind(lora, is_low_rank=True),
    "LoHa": loha(2),
    "LoHa, high rank": loha(8),
    "LoKr": Kind(lokr),
    "LoKr, low rank": Kind(lokr_of_low_rank, is_low_rank=True),
    "DoRA, outputs": dora(lora, "out"),
    "DoRA, inputs": dora(lora, "in"),
    "LoKr with DoRA, outputs": dora(lokr, "out"),
    "LoKr with DoRA, inputs": dora(lokr, "in"),
    "LoHa with DoRA, outputs": dora(loha(8).make, "out"),
    "full": Kind(full),
    "OFT, inputs": oft(),
    "OFT, inputs, scaled and shared": oft(is_scaled=True, is_shared=True),
    "OFT, outputs": diagonal_oft(),
    "OFT, outputs, rescaled and bounded": diagonal_oft(rescale=True, bound=0.01),
    "BOFT": Kind(boft),
}
# For convolutions with a kernel, where a core makes sense.
CORES = {
    "LoCon with a core": Kind(tucker_lora, is_low_rank=True),
    "LoHa with a core": loha(2, is_tucker=True),
    "LoKr with a core": Kind(tucker_lokr),
    "LoCon with a core and DoRA, inputs": dora(tucker_lora, "in"),
}
