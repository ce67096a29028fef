"""What a call costs on a GPU, in three numbers: the GPU's work, the host's launch, and how far the result is off.

The host's clock around a call of some microseconds measures Python, and a set of inputs that is used again and again
stays in the L2 cache. So the calls are recorded into a CUDA graph, over as many sets of inputs as exceed the cache,
and replayed between two events of the device, after a write that flushes the cache. A function that cannot be recorded
is called between the events, which see its launches too where those take longer than the work; `timed_by` tells which
it was. On a CPU, for dry runs, the host's clock measures all.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.evaluation.machine import synchronize


FLUSH_BYTES = 2**28  # more than the L2 cache of any GPU
MAX_SETS = 16

Arguments = dict[str, Any]


def rotating(make: Callable[[], Arguments]) -> list[Arguments]:
    """Sets of arguments that together are twice as large as the L2 cache, from 2 to `MAX_SETS`; on a CPU one set."""
    first = make()
    tensors = list(tensors_of(first))
    if not any(tensor.is_cuda for tensor in tensors):
        return [first]
    wanted = 2 * torch.cuda.get_device_properties(0).L2_cache_size / sum(tensor.nbytes for tensor in tensors)
    return [first, *(make() for _ in range(1, max(2, min(MAX_SETS, round(wanted)))))]


@torch.no_grad()
def costs(
    functions: dict[str, Callable[..., Any]],
    inputs: Sequence[Arguments] = ({},),
    rounds: int = 10,
    replays: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Medians of each function, measured in turn.

    Args:
        functions: each is called with every set of `inputs`.
        rounds: timed passes over all sets, after the untimed ones that compile and record.
        replays: functions that replay a graph of their own, which cannot be part of another.

    Returns:
        By name `gpu_seconds` and `launch_seconds` of one call, and `timed_by`: "graph", "events" or "clock".
    """
    passes = {name: partial(_call_all, function, inputs) for name, function in functions.items()}
    for run in passes.values():
        run()
    synchronize()
    on_gpu = torch.cuda.is_available()
    recorded = {name: (run, "events" if on_gpu else "clock") for name, run in passes.items()}
    if on_gpu:
        recorded |= {name: _record(run) for name, run in passes.items() if name not in replays}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if on_gpu else torch.empty(0)
    work: dict[str, list[float]] = {name: [] for name in functions}
    launches: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, (replay, _) in recorded.items():
            flush.zero_()
            work[name].append(_seconds_on_device(replay) / len(inputs))
            if not on_gpu:
                launches[name] = work[name]
                continue
            start = time.perf_counter()
            passes[name]()
            launches[name].append((time.perf_counter() - start) / len(inputs))
            synchronize()
    return {
        name: {
            "gpu_seconds": statistics.median(work[name]),
            "launch_seconds": statistics.median(launches[name]),
            "timed_by": timed_by,
        }
        for name, (_, timed_by) in recorded.items()
    }


def _call_all(function: Callable[..., Any], inputs: Sequence[Arguments]) -> None:
    for arguments in inputs:
        function(**arguments)


def _record(run: Callable[[], None]) -> tuple[Callable[[], None], str]:
    """A replay of the kernels that `run` launches; or `run` itself, if it does what cannot be recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # it waits for the GPU
        torch.cuda.synchronize()
        return run, "events"
    graph.replay()
    return graph.replay, "graph"


def _seconds_on_device(run: Callable[[], None]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end) / 1000


def error(actual: Any, reference: Any) -> float:
    """The largest error of the tensors of a result: relative to the norm, and for codes the share that differ."""
    parts = zip(tensors_of(actual), tensors_of(reference), strict=True)
    return max(_error(ours.detach(), theirs.detach()) for ours, theirs in parts)


def _error(actual: Tensor, reference: Tensor) -> float:
    if not reference.is_floating_point():
        return (actual != reference).double().mean().item()
    actual, reference = actual.double(), reference.double()
    return ((actual - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def in_fp32(arguments: Arguments) -> Arguments:
    """The same arguments with tensors, and a dtype asked for, of half precision widened."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            return value.float()
        if isinstance(value, torch.dtype):
            return torch.float32
        return [widen(item) for item in value] if isinstance(value, list) else value

    return {name: widen(value) for name, value in arguments.items()}


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
