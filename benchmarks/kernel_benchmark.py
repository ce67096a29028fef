"""What a benchmark of one operation states, and how it is timed on a GPU.

    python -m benchmarks.kernel_benchmark rms_norm

This times one operation; `bench_gpu.py` times all.

`bench_<operation>.py` builds a `KernelBenchmark`: the operation, the shapes of the real models, the bytes and FLOPs
that it must move and do. From it come the timing (here), the ahead-of-time compilation (`compile_kernels.py`) and the
roofline.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import alternate, environment, write_results
from diffusers_sana.kernels.dispatch import kernel_mode


Tensors = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One shape of a real model.

    Attributes:
        name: e.g. "sana-1.6b 1024px".
        make: `(device, dtype)` to the operation's keyword arguments.
        num_bytes: least traffic to and from device memory in bf16.
        num_flops: floating point operations.
    """

    name: str
    make: Callable[[str, torch.dtype], Tensors]
    num_bytes: int
    num_flops: int


@dataclass(frozen=True)
class KernelBenchmark:
    """One operation.

    Attributes:
        operation: the public function; takes what `Case.make` returns.
        cases: shapes of real models.
        launches: functions of the same arguments that launch the operation's kernels, forward and backward, for
            compilation without a GPU.
        eager: what a model does without the operation, where that is something else than the reference.
    """

    operation: Callable[..., Tensor]
    cases: Sequence[Case]
    launches: Sequence[Callable[..., Any]]
    eager: Callable[..., Tensor] | None = None
    dtype: torch.dtype = field(default=torch.bfloat16)

    @property
    def name(self) -> str:
        return self.operation.__name__


def operations() -> list[str]:
    """Names of the operations: those that have a benchmark of the name of their file."""
    kernels = Path(import_module("diffusers_sana.kernels").__file__ or "").parent
    return sorted(
        path.stem for path in kernels.glob("*.py") if Path(__file__).with_name(f"bench_{path.name}").exists()
    )


def load(operation: str) -> KernelBenchmark:
    """The benchmark of an operation."""
    return import_module(f"benchmarks.bench_{operation}").BENCHMARK


def run_on_gpu(benchmark: KernelBenchmark, rounds: int = 20, with_compiled: bool = True) -> dict[str, Any]:
    """Times kernel, eager and compiled eager in turn; seconds, GB/s and TFLOP/s of each case."""
    eager = benchmark.eager or _in_mode("torch", benchmark.operation)
    functions = {"kernel": _in_mode("triton", benchmark.operation), "eager": eager}
    if with_compiled:
        functions["compiled"] = torch.compile(eager, dynamic=False)
    report = {}
    for case in benchmark.cases:
        arguments = case.make("cuda", benchmark.dtype)
        seconds = alternate({name: partial(f, **arguments) for name, f in functions.items()}, rounds=rounds)
        report[case.name] = {
            "microseconds": {name: 1e6 * value for name, value in seconds.items()},
            "bytes": case.num_bytes,
            "flops": case.num_flops,
            "gigabytes_per_second": case.num_bytes / seconds["kernel"] / 1e9,
            "teraflops": case.num_flops / seconds["kernel"] / 1e12,
            "speedup_over_eager": seconds["eager"] / seconds["kernel"],
        }
    return report


def _in_mode(mode: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(**arguments: Any) -> Tensor:
        with kernel_mode(mode):
            return function(**arguments)

    return run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", choices=operations())
    benchmark = load(parser.parse_args(argv).operation)
    if not torch.cuda.is_available():
        raise SystemExit(f"The kernel of `{benchmark.name}` is timed on a GPU; there is none here.")
    report = {**environment(), "kernels": {benchmark.name: run_on_gpu(benchmark)}}
    print(write_results(f"kernel_{benchmark.name}", report))


if __name__ == "__main__":
    main()
