"""The inputs of layers while a 16-bit pipeline runs: the statistics that `decompose` takes.

Forward pre-hooks observe the inputs of each layer, at every step and in both halves of guidance. For a 1x1 convolution
the pixels are the rows. Only the sample of rows is random, and it depends on nothing but the seed and the name of the
layer: the number of passes in which the layers are observed makes no difference.

Legend: M tokens of a call, K input features, S sample rows.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_sana.quantizers.svdquant.algorithm.decompose import SAMPLE_ROWS
from diffusers_sana.quantizers.svdquant.targets import LayerGroup


if TYPE_CHECKING:
    from diffusers_sana.quantizers.svdquant.unfinished_run import UnfinishedRun


@dataclass
class Statistics:
    """Inputs of a layer, on the CPU.

    Attributes:
        inputs: a uniform sample of all rows, `[S, K]`, in the dtype of the layer and in order of appearance.
        largest: largest magnitude of each channel over all rows, `[K]`, fp32.
        hessian: sum of `x x^T` over all rows, `[K, K]`, fp32, or None.
    """

    inputs: Tensor
    largest: Tensor
    hessian: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By name, as `decompose` takes them."""
        return {name: value for name, value in vars(self).items() if value is not None}


def group_statistics(
    run: Callable[[], Any],
    groups: Sequence[LayerGroup],
    unfinished: Sequence[LayerGroup],
    with_hessian: Collection[str],
    memory_bytes: float,
    seed: int,
    run_state: "UnfinishedRun | None" = None,
) -> Iterator[tuple[LayerGroup, Statistics]]:
    """Statistics of groups of layers, one by one; runs the pipeline as often as the memory limit requires.

    Args:
        run: runs the pipeline, over all calibration data.
        groups: all groups that are to be quantized.
        unfinished: those whose statistics are wanted.
        with_hessian: keys of those that need a hessian.
        memory_bytes: limit for what is collected in one pass.
        seed: of the sample.
        run_state: has the statistics of an interrupted run, which are returned first, and keeps the new ones.
    """
    stored = set(run_state.statistics()) if run_state else set()
    for group in unfinished:
        if run_state and group.key in stored:
            yield group, run_state.load_statistics(group.key)
    missing = {group.key: group for group in unfinished if group.key not in stored}
    layers = {group.key: group.layers[0] for group in groups}
    sizes = {key: statistics_bytes(layers[key], key in with_hessian) for key in missing}
    for keys in split_by_memory(sizes, memory_bytes):
        statistics = collect_statistics(run, layers, keys, with_hessian, seed)
        if run_state:
            for key in keys:
                run_state.save_statistics(key, statistics[key])
        for key in keys:
            yield missing[key], statistics.pop(key)


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
        observed: names of those to observe. All layers get a hook, because a model may take another path through
            layers without hooks, and all passes must see the same numbers.
        with_hessian: names of those whose hessian is needed; it is summed call by call, so its memory does not depend
            on the number of rows.
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


def split_by_memory(sizes: Mapping[str, int], memory_bytes: float) -> list[list[str]]:
    """The names in parts whose sizes add up to at most `memory_bytes`; a larger one is a part by itself."""
    parts: list[list[str]] = []
    used = memory_bytes
    for name, size in sizes.items():
        if not parts or used + size > memory_bytes:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts


def run_pipeline(
    pipe: Any,
    prompts: Sequence[str],
    num_inference_steps: int | None,
    seed: int,
    progress: bool,
    kwargs: dict[str, Any],
) -> None:
    """Runs a pipeline for each prompt, up to the latents; prompt i gets the noise of `seed + i`."""
    steps = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    settings = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        with _unchanged_tokenizers(pipe):
            for i, prompt in enumerate(tqdm(prompts, desc="Calibrating", unit="prompt", disable=not progress)):
                generator = torch.Generator("cpu").manual_seed(seed + i)  # the same noise on every device
                pipe(**{"prompt": prompt, "generator": generator, "output_type": "latent", **steps, **kwargs})
    finally:
        pipe.set_progress_bar_config(**settings)


@contextmanager
def _unchanged_tokenizers(pipe: Any) -> Iterator[None]:
    """Tokenizers keep padding and truncation of their last call, and would be saved with them."""
    backends = [c.backend_tokenizer for c in pipe.components.values() if hasattr(c, "backend_tokenizer")]
    before = [(backend.truncation, backend.padding) for backend in backends]
    try:
        yield
    finally:
        for backend, (truncation, padding) in zip(backends, before, strict=True):
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
            backend.no_padding() if padding is None else backend.enable_padding(**padding)


def _ignore(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """The hook of a layer that is not observed in this pass."""


class _Observer:
    """A pre-hook. Each row gets a random number, and the rows with the smallest numbers are the sample."""

    def __init__(self, layer: nn.Module, name: str, with_hessian: bool, seed: int) -> None:
        weight: Any = layer.weight
        self.name, self.dtype, features = name, weight.dtype, weight.shape[1]
        self.generator = torch.Generator().manual_seed(seed + crc32(name.encode()))
        self.inputs = torch.empty(0, features, dtype=self.dtype)
        self.ranks = torch.empty(0, dtype=torch.float64)
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
        ranks = torch.rand(len(rows), generator=self.generator, dtype=torch.float64)
        threshold = self.ranks.max() if len(self.ranks) == SAMPLE_ROWS else 1.0
        new = (ranks < threshold).nonzero().flatten()
        if len(new) > SAMPLE_ROWS:
            new = new[ranks[new].topk(SAMPLE_ROWS, largest=False).indices.sort().values]
        taken = rows[new.to(rows.device)].to("cpu", self.dtype)
        self.inputs, self.ranks = torch.cat([self.inputs, taken]), torch.cat([self.ranks, ranks[new]])
        if len(self.ranks) > SAMPLE_ROWS:
            kept = self.ranks.topk(SAMPLE_ROWS, largest=False).indices.sort().values
            self.inputs, self.ranks = self.inputs[kept], self.ranks[kept]

    def statistics(self) -> Statistics:
        """What was observed."""
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
