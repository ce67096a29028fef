"""Ranks and precisions of layers under a budget of bytes, from measured errors.

Every group of layers that share their input is fitted in 4 bits with several ranks and in int8 without a branch, and
may also stay in 16 bit. The choice starts with the smallest option of each group. The upgrade that lowers the error
most per byte is taken, again and again, as long as the budget allows. The error is the sum over layers of the squared
relative error of the output, in which all layers count the same: how much the error of a layer changes the result of
the model is not known.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from diffusers_sana.quantizers.svdquant.algorithm.decompose import LayerReport
from diffusers_sana.quantizers.svdquant.algorithm.quantized_weight import QuantizedWeight
from diffusers_sana.quantizers.svdquant.targets import weight_shape


RANKS = (0, 8, 16, 32, 64, 128)


@dataclass
class Option:
    """One way to store a group of layers.

    Attributes:
        bytes: of its weights.
        error: sum of the squared relative errors of the outputs; 0 in 16 bit.
        mode: of the layers, one of `LAYER_MODES`; "" in 16 bit.
        results: the quantized weights with their reports; none in 16 bit.
    """

    bytes: int
    error: float
    mode: str = ""
    results: Sequence[tuple[QuantizedWeight, LayerReport]] = ()

    @classmethod
    def of(cls, mode: str, results: Sequence[tuple[QuantizedWeight, LayerReport]]) -> "Option":
        """Quantized, from the output of `decompose`."""
        size = sum(tensor.nbytes for weight, _ in results for tensor in weight.tensors().values())
        return cls(size, sum(report.error**2 for _, report in results), mode, results)


def parse_budget(budget: str) -> float:
    """The share of the bf16 model's bytes that "0.30x" stands for."""
    return float(budget.removesuffix("x"))


def ranks_for(layers: Sequence[nn.Module]) -> list[int]:
    """The ranks that are tried: those up to half of the smaller side."""
    side = min(min(weight_shape(layer)) for layer in layers)
    return [rank for rank in RANKS if rank <= side // 2]


def bf16_bytes(models: Iterable[nn.Module]) -> int:
    """Bytes of all tensors of the models in bf16."""
    return sum(2 * tensor.numel() for model in models for tensor in model.state_dict().values())


def choose(options: Mapping[str, Sequence[Option]], other_bytes: int, most_bytes: float) -> dict[str, Option]:
    """The options under a budget.

    Args:
        options: of each group, by its key; all of a group are for the same layers.
        other_bytes: of all tensors that have no options.
        most_bytes: the budget for all tensors.

    Raises:
        ValueError: a budget that is too small for the smallest options.
    """
    chosen = {key: min(group, key=lambda option: (option.bytes, option.error)) for key, group in options.items()}
    used = other_bytes + sum(option.bytes for option in chosen.values())
    if used > most_bytes:
        raise ValueError(
            f"`budget` must leave room for {used:,} bytes, which the model takes with rank 0 in all layers, got "
            f"{most_bytes:,.0f} bytes. Raise it, or quantize more layers with `modules`."
        )
    while True:
        upgrades = [
            ((chosen[key].error - option.error) / max(option.bytes - chosen[key].bytes, 1), key, option)
            for key, group in options.items()
            for option in group
            if option.error < chosen[key].error and used + option.bytes - chosen[key].bytes <= most_bytes
        ]
        if not upgrades:
            return chosen
        _, key, option = max(upgrades, key=lambda upgrade: upgrade[0])
        used += option.bytes - chosen[key].bytes
        chosen[key] = option
