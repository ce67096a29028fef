"""A LoRA from two checkpoints: what fine-tuning changed, as the best product of low rank.

Legend: N outputs, K inputs of a layer, r rank.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_sana.kernels.low_bit import nonzero
from diffusers_sana.quantizers.svdquant.algorithm.randomized_svd import randomized_svd, weighted_svd
from diffusers_sana.quantizers.svdquant.calibrate import collect_statistics, split_by_memory, statistics_bytes


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractedLora:
    """A LoRA that was computed from two checkpoints.

    Attributes:
        state_dict: factors as PEFT names them, for `load_lora_adapter` and `save_lora_weights`; the scale is 1.
        errors: of each layer, the part of the change that the LoRA lacks, 0 to 1: of the weight's change, or of the
            output's where the inputs of layers were given.
        left_out: changed parameters that a LoRA cannot hold, such as biases, norms and depthwise convolutions.
    """

    state_dict: dict[str, Tensor]
    errors: dict[str, float]
    left_out: list[str]


@torch.no_grad()
def extract_lora(
    base: nn.Module,
    tuned: nn.Module,
    rank: int = 16,
    run: Callable[[], Any] | None = None,
    seed: int = 0,
    memory_bytes: float = 4e9,
) -> ExtractedLora:
    """The LoRA of a rank that comes nearest to `tuned` when it is loaded on `base`.

    Each layer's change is cut after its largest singular values. With `run` it is weighted by the inputs that the
    layers see: the mean error of the layer's output is the smallest, and not that of its weight.

    Args:
        base, tuned: models of one architecture: transformers, text encoders or others. Linear layers and 1x1
            convolutions are compared; neither model changes.
        rank: of every layer that has changed.
        run: runs `base` on typical inputs, for instance `lambda: pipe(prompts, output_type="latent")` for the pipeline
            that has it. None: all directions of the input count alike.
        seed: of the search for the directions; the same seed gives the same bits on one device.
        memory_bytes: limit for the statistics of one pass; `run` is called as often as that requires.

    Raises:
        ValueError: models of different architectures, a rank below 1, or models without a difference.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}. 4 to 64 are usual.")
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    shapes = [{name: value.shape for name, value in each.items()} for each in (before, after)]
    if shapes[0] != shapes[1]:
        name = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
        raise ValueError(
            f"`tuned` must be of the architecture of `base`, but {name!r} differs in shape or is in one of them only."
        )
    changed = [name for name, value in before.items() if not torch.equal(value, after[name].to(value))]
    layers = {name: layer for name, layer in _layers(base) if f"{name}.weight" in changed}
    if not layers:
        raise ValueError("`tuned` must differ from `base` in linear layers, but none has changed. Check the paths.")
    left_out = [name for name in changed if name.removesuffix(".weight") not in layers]
    if left_out:
        logger.warning("A LoRA cannot hold the changes of %d parameters, such as %r.", len(left_out), left_out[0])
    state, errors = {}, {}
    for name, covariance in _covariances(base, layers, run, seed, memory_bytes):
        old, new = before[f"{name}.weight"], after[f"{name}.weight"]
        change = (new.to(old.device).float() - old.float()).flatten(1)
        number = crc32(name.encode()) ^ seed
        if covariance is None:
            up, down = randomized_svd(change, min(rank, *change.shape), number)
        else:
            covariance = covariance.to(change)
            up, down = weighted_svd(change, min(rank, *change.shape), number, covariance)
        errors[name] = _size(change - up @ down, covariance) / max(_size(change, covariance), 1e-30)
        root = up.norm(dim=0).sqrt()  # shared by both factors, so that neither is large
        missing = rank - len(down)
        window = old.shape[2:]
        first = F.pad(down * root[:, None], (0, 0, 0, missing)).to(old.dtype)
        second = F.pad(up / nonzero(root), (0, missing)).to(old.dtype)
        state[f"{name}.lora_A.weight"] = first.reshape(*first.shape, *window).contiguous()
        state[f"{name}.lora_B.weight"] = second.reshape(*second.shape, *window).contiguous()
    return ExtractedLora(state, errors, left_out)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that are matrices, by name."""
    for name, module in model.named_modules():
        is_kernel = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        if is_kernel or isinstance(module, nn.Linear):
            yield name, module


def _covariances(
    base: nn.Module,
    layers: Mapping[str, nn.Module],
    run: Callable[[], Any] | None,
    seed: int,
    memory_bytes: float,
) -> Iterator[tuple[str, Tensor | None]]:
    """Of each layer the sum of `x x^T` over its inputs, `[K, K]`; None without `run`."""
    if run is None:
        yield from ((name, None) for name in layers)
        return
    for names in split_by_memory({name: statistics_bytes(layers[name], True) for name in layers}, memory_bytes):
        statistics = collect_statistics(run, layers, names, names, seed)
        for name in names:
            yield name, statistics.pop(name).hessian


def _size(change: Tensor, covariance: Tensor | None) -> float:
    """The root of the summed squares of a change, or of what it does to inputs of a covariance."""
    squares = change.square() if covariance is None else change * (change @ covariance)
    return max(squares.sum(dtype=torch.float64).item(), 0.0) ** 0.5
