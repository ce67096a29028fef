"""What layers are fed while a 16-bit pipeline runs: the statistics that `decompose` wants.

Forward pre-hooks look at the inputs of each layer, at every step and in both halves of guidance. Of a 1x1 convolution
the pixels are the rows. Nothing is random but the sample of rows, and that depends on the seed and the layer's name
only: in how many passes the layers are observed makes no difference.

Legend: M tokens of a call, K input features, S sample rows.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from diffusers_sana.quantizers.svdquant.algorithm.decompose import SAMPLE_ROWS


@dataclass
class Statistics:
    """Inputs of a layer, on the CPU.

    Attributes:
        inputs: a uniform sample of all rows, `[S, K]`, in the dtype of the layer; in the order of their appearance.
        largest: largest magnitude of each channel over all rows, `[K]`, fp32.
        hessian: sum of `x x^T` over all rows, `[K, K]`, fp32, or None.
    """

    inputs: Tensor
    largest: Tensor
    hessian: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By name, as `decompose` takes them."""
        return {name: value for name, value in vars(self).items() if value is not None}


def collect_statistics(
    run: Callable[[], Any],
    layers: Mapping[str, nn.Module],
    observed: Collection[str],
    with_hessian: Collection[str] = (),
    seed: int = 0,
) -> dict[str, Statistics]:
    """Observes the inputs of layers.

    Args:
        run: runs the pipeline, over all calibration data.
        layers: by name: linear layers and 1x1 convolutions.
        observed: names of those to observe. All get a hook, because a model may compute with plain layers otherwise,
            and all passes over it shall see the same numbers.
        with_hessian: names of those whose hessian is wanted; it is summed call by call, so that the number of rows
            does not matter to the memory.
        seed: of the sample.

    Returns:
        For each observed name.

    Raises:
        ValueError: a layer that did not run, or whose inputs were not finite.
    """
    observers = {name: _Observer(layers[name], name, name in with_hessian, seed) for name in observed}
    handles = [
        layer.register_forward_pre_hook(observers.get(name, _ignore), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: observer.statistics() for name, observer in observers.items()}


def statistics_bytes(layer: nn.Module, with_hessian: bool) -> int:
    """Memory that the statistics of a layer take."""
    weight: Any = layer.weight
    features = weight.shape[1]
    return features * (SAMPLE_ROWS * weight.element_size() + 4) + (4 * features**2 if with_hessian else 0)


def passes(sizes: Mapping[str, int], budget: float) -> list[list[str]]:
    """The names in parts whose sizes add up to at most `budget`; what is larger alone is a part of its own."""
    parts: list[list[str]] = []
    used = budget
    for name, size in sizes.items():
        if not parts or used + size > budget:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts


def _ignore(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """The hook of a layer that is not observed in this pass."""


class _Observer:
    """A pre-hook. Each row draws a number, and those with the least numbers are the sample."""

    def __init__(self, layer: nn.Module, name: str, with_hessian: bool, seed: int) -> None:
        weight: Any = layer.weight
        self.name, self.dtype, features = name, weight.dtype, weight.shape[1]
        self.generator = torch.Generator().manual_seed(seed + crc32(name.encode()))
        self.inputs = torch.empty(0, features, dtype=self.dtype)
        self.draws = torch.empty(0, dtype=torch.float64)
        self.largest: Tensor | None = None
        self.hessian: Tensor | None = None
        self.with_hessian = with_hessian

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach()
        rows = (x.movedim(-3, -1) if isinstance(module, nn.Conv2d) else x).flatten(0, -2)
        if len(rows) == 0:
            return
        largest = rows.abs().amax(0).float()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        if self.with_hessian:
            full = rows.float()
            hessian = full.new_zeros(full.shape[1], full.shape[1]) if self.hessian is None else self.hessian
            self.hessian = hessian.addmm_(full.t(), full)
        self._sample(rows)

    def _sample(self, rows: Tensor) -> None:
        draws = torch.rand(len(rows), generator=self.generator, dtype=torch.float64)
        bar = self.draws.max() if len(self.draws) == SAMPLE_ROWS else 1.0
        new = (draws < bar).nonzero().flatten()
        if len(new) > SAMPLE_ROWS:
            new = new[draws[new].topk(SAMPLE_ROWS, largest=False).indices.sort().values]
        taken = rows[new.to(rows.device)].to("cpu", self.dtype)
        self.inputs, self.draws = torch.cat([self.inputs, taken]), torch.cat([self.draws, draws[new]])
        if len(self.draws) > SAMPLE_ROWS:
            kept = self.draws.topk(SAMPLE_ROWS, largest=False).indices.sort().values
            self.inputs, self.draws = self.inputs[kept], self.draws[kept]

    def statistics(self) -> Statistics:
        """What was seen."""
        if self.largest is None:
            raise ValueError(
                f"layer {self.name!r} did not run for these prompts. Leave it out with `modules_to_not_convert`, or "
                "pass prompts and arguments of the pipeline for which it runs."
            )
        if not self.largest.isfinite().all():
            raise ValueError(
                f"the inputs of layer {self.name!r} must be finite, got NaN or infinity while the pipeline ran. Load "
                "it in bf16 or fp32."
            )
        return Statistics(self.inputs, self.largest.cpu(), None if self.hessian is None else self.hessian.cpu())
