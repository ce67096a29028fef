"""Replays the transformer's kernels as one CUDA graph per step, for models whose launches take longer than their work.

A graph is recorded for each shape of the inputs and each choice of attention processors. It reads its inputs from its
own memory, into which every step copies its latents and time, and every prompt its text. A recording is valid only
while the weights stay where they are and adapters keep their strengths, so a fingerprint of both is taken at the start
of every pipeline call.

`CudaGraphs` is what `enable_cuda_graphs` asks for: it raises where it cannot record. `AutomaticGraphs` is the default:
it records where nothing prevents that, and says once why it does not.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from diffusers.utils import logging
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

from diffusers_sana.kernels.dispatch import current_kernel_mode, kernel_mode
from diffusers_sana.kernels.kept import kept_changes
from diffusers_sana.locks import exclusive
from diffusers_sana.models.layers import hooks_of, is_patched
from diffusers_sana.models.transformers.attention_sana import (
    SanaAttnProcessor,
    SanaLinearAttnProcessor,
    SanaPAGAttnProcessor,
)
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel


logger = logging.get_logger(__name__)

MAX_GRAPHS = 8  # shapes kept at a time; the one that was used longest ago goes first
MAX_SEEN = 64  # shapes that the automatic graphs remember
WARMUP = 2  # runs before recording, in which kernels are compiled and workspaces made
DEVICE_TYPE = "cuda"  # also that of AMD's GPUs
# Models and processors whose code does not depend on values or on the number of the step.
RECORDABLE = (SanaTransformer2DModel, SanaVideoTransformer3DModel)
PROCESSORS = (SanaAttnProcessor, SanaLinearAttnProcessor)
# Relative errors of the model's output above which the kernels are wrong: several times the tolerances of
# `tests/test_gpu.py`, and a wrong kernel gives about 1.
KERNEL_TOLERANCES = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.2}


class CudaGraphs:
    """Graphs of one model's forward pass, by the shapes of its arguments.

    The graphs share their memory, so they take about as much as one step does, and are replayed one at a time.

    Args:
        model: called with tensors and structures of tensors (tuples, dicts, dataclasses) as keyword arguments; runs no
            code that depends on their values.
        graph_class: makes a graph of a model, its arguments, their tensors, and the memory pool that graphs share.
    """

    def __init__(self, model: nn.Module, graph_class: Callable[..., Any] | None = None) -> None:
        self.model = model
        self._graph_class = graph_class or _Graph
        self._graphs: dict[Hashable, Any] = {}
        self._fingerprint: Hashable = None
        self._attentions: list[Any] = []
        _ALL.add(self)

    @property
    def is_active(self) -> bool:
        """Whether steps are to be asked of the graphs instead of the model."""
        return True

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

    def refresh_within_call(self) -> None:
        """`refresh` after what may have changed the model between two steps, such as a callback."""
        self.refresh()

    def release(self, device: torch.device) -> bool:
        """Drops all graphs if they are on a device, with their memory; whether there were any."""
        with exclusive(self.model):
            if not self._graphs or next(self.model.parameters()).device != device:
                return False
            self._graphs.clear()
        return True

    def __call__(self, **arguments: Any) -> Tensor:
        """The first output of `model(**arguments)`, in memory that the next call overwrites."""
        tensors, shape = self._describe(arguments)
        if shape not in self._graphs:
            self._record(shape, arguments, tensors)
        return self._replay(shape, tensors)

    def __reduce__(self) -> Any:
        """A copy of the pipeline has a copy of the model, which is recorded again."""
        return type(self), (self.model,)

    def _describe(self, arguments: dict[str, Any]) -> tuple[list[Tensor], Hashable]:
        tensors, shape = _flatten(arguments)
        return tensors, (shape, tuple(module.processor for module in self._attentions))

    def _record(self, shape: Hashable, arguments: dict[str, Any], tensors: list[Tensor]) -> None:
        while len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        pool = next((graph.pool for graph in self._graphs.values()), None)
        self._graphs[shape] = self._graph_class(self.model, arguments, tensors, pool)

    def _replay(self, shape: Hashable, tensors: list[Tensor]) -> Tensor:
        graph = self._graphs[shape] = self._graphs.pop(shape)  # now the last that would be dropped
        return graph.replay(tensors)


class AutomaticGraphs(CudaGraphs):
    """Graphs where nothing prevents them, without an error where something does: then the model runs as usual.

    What prevents all of them (a device without graphs, hooks, compiled code) is looked at in `refresh`. A shape is
    recorded when it is met for the second time, so inputs that change from step to step are not. Each shape is
    checked at its first use: the model's output with our kernels against that with PyTorch's operations, and the
    graph's output against the model's, bit by bit. What fails a check is not used again for that shape, and a warning
    says so. Other values of the weights and other strengths of adapters need another graph, but run the same kernels,
    which are not checked again.
    """

    def __init__(self, model: nn.Module, graph_class: Callable[..., Any] | None = None) -> None:
        super().__init__(model, graph_class)
        self._reason: str | None = None
        self._logged: set[str] = set()
        self._computation: Hashable = None
        # By what the model computes and the shape: whether it may be recorded, and the kernel mode that it runs in.
        self._seen: dict[Hashable, _Seen] = {}

    @property
    def is_active(self) -> bool:
        """Not where something prevents all graphs."""
        return self._reason is None

    def refresh(self) -> None:
        """As in `CudaGraphs`, but never raises."""
        self._reason = unsupported(self.model)
        if self._reason is not None:
            self._graphs.clear()
            self._explain(self._reason)
            return
        fingerprint = _fingerprint(self.model), current_kernel_mode()
        if fingerprint != self._fingerprint:
            self._graphs.clear()
            self._fingerprint, self._attentions = fingerprint, _attentions(self.model)
            self._computation = _computation(self.model), current_kernel_mode()

    def refresh_within_call(self) -> None:
        """As `refresh`. What changes the model once may do so at every step, so the other steps run without graphs."""
        before = self._fingerprint
        self.refresh()
        if self._reason is None and self._fingerprint != before:
            self._reason = "a callback has changed the model"
            self._explain(self._reason)

    def release(self, device: torch.device) -> bool:
        """As in `CudaGraphs`. Shapes met so far are not recorded again, as their graphs would be in the way again."""
        if not super().release(device):
            return False
        for seen in self._seen.values():
            seen.is_recordable = False
        self._explain("something else needs their memory")
        return True

    def __call__(self, **arguments: Any) -> Tensor:
        """The first output of `model(**arguments)`, in memory that the next call may overwrite."""
        reason = _unrecordable(arguments)
        if reason is not None:
            self._explain(reason)
            return self.model(**arguments)[0]
        tensors, shape = self._describe(arguments)
        if shape in self._graphs:
            return self._replay(shape, tensors)
        computed = self._computation, self._describe(_without_strength(arguments))[1]
        seen = self._seen.get(computed)
        if seen is None:
            while len(self._seen) >= MAX_SEEN:
                del self._seen[next(iter(self._seen))]
            output = self.model(**arguments)[0]
            seen = self._seen[computed] = _Seen(*self._checked_kernels(arguments, output))
            return output if seen.mode is None else self._eager(arguments, "torch")
        output = self._eager(arguments, seen.mode)
        if seen.is_recordable:
            seen.is_recordable = self._checked_graph(shape, arguments, tensors, output)
        return output

    def _eager(self, arguments: dict[str, Any], mode: str | None) -> Tensor:
        if mode is None:
            return self.model(**arguments)[0]
        with kernel_mode(mode):
            return self.model(**arguments)[0]

    def _checked_kernels(self, arguments: dict[str, Any], output: Tensor) -> tuple[bool, str | None]:
        """Whether the shape may be recorded, and the kernel mode to use from now on, None for the current one."""
        if current_kernel_mode() != "auto":  # the user has chosen
            return True, None
        try:
            expected = self._eager(arguments, "torch").float()
        except torch.OutOfMemoryError:  # PyTorch's operations need more memory than the kernels
            self._explain("there is not enough memory to check the kernels against PyTorch's operations")
            return True, None
        error = ((output.float() - expected).norm() / expected.norm().clamp_min(1e-20)).item()
        if not expected.isfinite().all() or error <= KERNEL_TOLERANCES.get(output.dtype, 0.2):
            return True, None
        logger.warning(
            f"The output of {type(self.model).__name__} for {_shapes(arguments)} with the Triton kernels differs by"
            f" {error:.1%} from that with PyTorch's operations, which are used for these shapes from now on. Please"
            " report it with the output of `diffusers-sana env`."
        )
        return False, "torch"

    def _checked_graph(
        self, shape: Hashable, arguments: dict[str, Any], tensors: list[Tensor], expected: Tensor
    ) -> bool:
        """Records a graph; whether its output is that of the model. If not, the graph is dropped."""
        try:
            self._record(shape, arguments, tensors)
            if torch.equal(self._replay(shape, tensors), expected) or not expected.isfinite().all():
                return True
        except torch.OutOfMemoryError:
            self._graphs.clear()
            self._explain("there is not enough memory to record them")
            return False
        except RuntimeError as error:  # an operation that cannot be recorded
            self._graphs.pop(shape, None)
            self._explain(f"recording failed: {error}")
            return False
        del self._graphs[shape]
        logger.warning(
            f"A CUDA graph of {type(self.model).__name__} for {_shapes(arguments)} does not give the bits of the model"
            " itself, which runs without a graph for these shapes. Please report it with the output of"
            " `diffusers-sana env`."
        )
        return False

    def _explain(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            logger.info(f"{type(self.model).__name__} runs without CUDA graphs: {reason}.")


_ALL: WeakSet[CudaGraphs] = WeakSet()


def release_graphs(device: torch.device) -> bool:
    """Drops all graphs on a device, whose memory PyTorch gives to nothing else; whether there were any."""
    return any([graphs.release(device) for graphs in list(_ALL)])  # a list, to release those of every pipeline


@dataclass
class _Seen:
    """What is known of a shape.

    Attributes:
        is_recordable: no recording of it has failed.
        mode: the kernel mode to use in place of the current one.
    """

    is_recordable: bool
    mode: str | None


class _Graph:
    # Outside of inference mode: its tensors could not be written into by a later call that is not in it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: nn.Module, arguments: dict[str, Any], tensors: list[Tensor], pool: Any) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        self.sources: list[tuple[Tensor, int] | None] = [None] * len(tensors)
        own = _unflatten(arguments, iter(self.inputs))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                model(**own)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):  # other threads go on
            self.output = model(**own)[0]

    @property
    def pool(self) -> Any:
        """The memory of its intermediate results, for other graphs to share."""
        return self.graph.pool()

    def replay(self, tensors: list[Tensor]) -> Tensor:
        for i, tensor in enumerate(tensors):
            # The text is the same object all through a call: copied once. Latents that a user gives may be the same
            # object in the next call, with other values. Tensors of inference mode do not count their changes.
            source = self.sources[i]
            version = 0 if tensor.is_inference() else tensor._version
            if source is None or tensor is not source[0] or version != source[1]:
                self.inputs[i].copy_(tensor)
                self.sources[i] = tensor, version
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


def _unrecordable(value: Any) -> str | None:
    """Why arguments of a step cannot be those of a graph, or None: it has to know all that they consist of."""
    if value is None or isinstance(value, bool | int | float | str | Tensor | torch.dtype | torch.device):
        return None
    parts: Any
    if isinstance(value, tuple | list):
        parts = value
    elif isinstance(value, dict):
        parts = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value)]
    else:
        return f"an argument of the model is a {type(value).__name__}"
    return next((reason for reason in map(_unrecordable, parts) if reason is not None), None)


def _without_strength(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a step without the strength of adapters, which chooses no other kernels."""
    options = arguments.get("attention_kwargs") or {}
    return arguments | {"attention_kwargs": {name: value for name, value in options.items() if name != "scale"}}


def _shapes(arguments: dict[str, Any]) -> str:
    return f"hidden states {list(arguments['hidden_states'].shape)}" if "hidden_states" in arguments else "its inputs"


def unsupported(model: Any) -> str | None:
    """Why the automatic graphs leave a model alone, or None."""
    if is_compiled_module(model) or any(module._compiled_call_impl is not None for module in model.modules()):
        return "it is compiled"
    if type(model) not in RECORDABLE:
        return f"{type(model).__module__}.{type(model).__name__} may have code that decides at every step"
    device = next(model.parameters()).device
    if device.type != DEVICE_TYPE:
        return f"it is on {device}"
    if model.training or torch.is_grad_enabled():
        return "it is in training"
    if torch.is_autocast_enabled(DEVICE_TYPE):
        return "autocast keeps copies of weights until it ends"
    if getattr(model, "_parallel_config", None) is not None:
        return "it is split between processes"
    for module in model.modules():
        if _is_hooked(module) or is_patched(module) or module._forward_hooks or module._forward_pre_hooks:
            return "offloading, a step cache or another hook decides at every step"
    for module in _attentions(model):
        processor = module.processor
        if isinstance(processor, SanaPAGAttnProcessor):
            processor = processor.processor
        if type(processor) not in PROCESSORS:
            return f"the attention processor {type(processor).__name__} may decide at every step"
    return None


def _fingerprint(model: nn.Module) -> Hashable:
    """What the model computes, where the weights and their copies are, and how strong adapters are."""
    weights = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    strengths = tuple(tuple(layer.scaling.items()) for layer in _adapted(model))
    return _computation(model), weights, kept_changes(), strengths


def _computation(model: nn.Module) -> Hashable:
    """Which operations the model consists of: its layers and their tensors, adapters, how they attend and compute."""
    classes = tuple(type(module) for module in model.modules())
    tensors = tuple((tensor.shape, tensor.dtype) for tensor in (*model.parameters(), *model.buffers()))
    adapters = tuple(
        (
            tuple(layer.active_adapters),
            tuple(layer.merged_adapters),  # fused in place, so the weights stay where they are
            bool(layer.disable_adapters),
        )
        for layer in _adapted(model)
    )
    processors = tuple(
        (module.processor, getattr(module.processor, "_attention_backend", None)) for module in _attentions(model)
    )
    modes = tuple(mode for module in model.modules() if (mode := getattr(module, "compute_mode", None)) is not None)
    return classes, tensors, adapters, processors, modes, model.training


def _adapted(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]


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
