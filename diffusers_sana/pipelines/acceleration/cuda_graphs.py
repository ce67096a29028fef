"""Replays the transformer's kernels as one CUDA graph per step, for models whose launches take longer than their work.

A graph is recorded for each shape of the inputs and each choice of attention processors. It reads its inputs from its
own memory, into which every step copies its latents and time, and every prompt its text. A recording is valid only
while the weights stay where they are and adapters keep their strengths, so a fingerprint of both is taken at the start
of every pipeline call.
"""

from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_sana.models.layers import hooks_of


MAX_GRAPHS = 8  # shapes kept at a time; the oldest goes first
WARMUP = 2  # runs before recording, in which kernels are compiled and workspaces made


class CudaGraphs:
    """Graphs of one model's forward pass, by the shapes of its arguments.

    Args:
        model: called with tensors and structures of tensors (tuples, dicts, dataclasses) as keyword arguments; runs no
            code that depends on their values.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._graphs: dict[Hashable, _Graph] = {}
        self._fingerprint: Hashable = None
        self._attentions: list[Any] = []

    def refresh(self) -> None:
        """Drops all graphs if weights have moved or adapters have changed since the last call.

        Raises:
            RuntimeError: the model is not on a GPU, or hooks on it decide again at every step.
        """
        _check(self.model)
        fingerprint = _fingerprint(self.model)
        if fingerprint != self._fingerprint:
            self._graphs.clear()
            self._fingerprint, self._attentions = fingerprint, _attentions(self.model)

    def __call__(self, **arguments: Any) -> Tensor:
        """The first output of `model(**arguments)`, in memory that the next call overwrites."""
        tensors, shape = _flatten(arguments)
        shape = shape, tuple(module.processor for module in self._attentions)
        graph = self._graphs.get(shape)
        if graph is None:
            if len(self._graphs) == MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            graph = self._graphs[shape] = _Graph(self.model, arguments, tensors)
        return graph.replay(tensors)


class _Graph:
    # Outside of inference mode: its tensors could not be written into by a later call that is not in it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: nn.Module, arguments: dict[str, Any], tensors: list[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        self.sources: list[Tensor | None] = [None] * len(tensors)
        own = _unflatten(arguments, iter(self.inputs))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                model(**own)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads go on
            self.output = model(**own)[0]

    def replay(self, tensors: list[Tensor]) -> Tensor:
        for i, tensor in enumerate(tensors):
            # The text is the same object all through a call, and nobody writes into it: copied once.
            if tensor is not self.sources[i]:
                self.inputs[i].copy_(tensor)
                self.sources[i] = tensor
        self.graph.replay()
        return self.output


def _flatten(value: Any) -> tuple[list[Tensor], Hashable]:
    """The tensors of a structure in order, and what else a graph depends on: layout, shapes, dtypes, constants."""
    tensors: list[Tensor] = []

    def describe(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            tensors.append(value)
            return (tuple(value.shape), value.stride(), value.dtype)
        if isinstance(value, tuple | list):
            return (type(value), *(describe(item) for item in value))
        if isinstance(value, dict):
            return tuple((name, describe(item)) for name, item in value.items())
        if is_dataclass(value):
            return (type(value), *(describe(getattr(value, field.name)) for field in fields(value)))
        return value

    shape = describe(value)
    return tensors, shape


def _unflatten(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with its tensors replaced, in order."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_unflatten(item, tensors) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_unflatten(item, tensors) for item in value)
    if isinstance(value, dict):
        return {name: _unflatten(item, tensors) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{field.name: _unflatten(getattr(value, field.name), tensors) for field in fields(value)}
        )
    return value


def _fingerprint(model: nn.Module) -> Hashable:
    """Where the weights are, what the adapters multiply their outputs with, and how the layers attend."""
    weights = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    layers: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    adapters = tuple(
        (tuple(layer.scaling.items()), tuple(layer.active_adapters), bool(layer.disable_adapters)) for layer in layers
    )
    processors = tuple(module.processor for module in _attentions(model))
    return weights, adapters, processors, model.training


def _attentions(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "processor")]


def _is_hooked(module: nn.Module) -> bool:
    return hasattr(module, "_hf_hook") or len(hooks_of(module)) > 0


def _check(model: nn.Module) -> None:
    if any(_is_hooked(module) for module in model.modules()):
        raise RuntimeError(
            "`enable_cuda_graphs` cannot be combined with offloading, step caches or layerwise casting: their hooks "
            "decide at every step. Call `pipe.disable_cuda_graphs()`, or turn the other off."
        )
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise RuntimeError(
            f"`enable_cuda_graphs` needs the transformer on a CUDA device, got {device}. Call `pipe.to('cuda')`, or "
            "`pipe.disable_cuda_graphs()`."
        )
