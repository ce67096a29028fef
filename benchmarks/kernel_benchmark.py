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

from benchmarks.gpu_timing import costs, error, in_fp32, rotating
from benchmarks.harness import environment, write_results
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
        tiny: a shape of no model, for a dry run on a CPU.
        eager: what a model does without the operation, where that is something else than the reference.
    """

    operation: Callable[..., Tensor]
    cases: Sequence[Case]
    launches: Sequence[Callable[..., Any]]
    tiny: Case
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


def run_on_gpu(
    benchmark: KernelBenchmark, rounds: int = 20, with_compiled: bool = True, device: str = "cuda", tiny: bool = False
) -> dict[str, Any]:
    """What kernel, eager and compiled eager cost and how far they are from the reference in fp32.

    Args:
        benchmark: the operation.
        rounds: timed passes.
        with_compiled: whether eager is compiled, too, which takes seconds a shape.
        device: "cpu" for a dry run in Triton's interpreter, which has no bf16: in fp16.
        tiny: only the benchmark's tiny shape.

    Returns:
        Of each case GB/s and TFLOP/s of the kernel by the GPU's time, and whether its result is `wrong`: further off
        than twice what PyTorch in the same dtype is. `decides` names the default that depends on it.
    """
    in_triton, in_torch = (_in_mode(mode, benchmark.operation) for mode in ("triton", "torch"))
    functions = {"kernel": in_triton, "eager": benchmark.eager or in_torch}
    if with_compiled:
        functions["compiled"] = torch.compile(functions["eager"], dynamic=False)
    cases, dtype = {}, benchmark.dtype if device == "cuda" else torch.float16
    for case in [benchmark.tiny] if tiny else benchmark.cases:
        inputs = rotating(partial(case.make, device, dtype))
        reference = in_torch(**in_fp32(inputs[0]))
        errors = {
            name: error(run(**inputs[0]), reference) for name, run in (("kernel", in_triton), ("torch", in_torch))
        }
        row = costs(functions, inputs, rounds)
        seconds = row["kernel"]["gpu_seconds"]
        cases[case.name] = {
            "costs": row,
            "error": errors,
            "wrong": not errors["kernel"] <= 2 * errors["torch"] + torch.finfo(torch.bfloat16).eps,
            "bytes": case.num_bytes,
            "flops": case.num_flops,
            "gigabytes_per_second": case.num_bytes / seconds / 1e9,
            "teraflops": case.num_flops / seconds / 1e12,
            "speedup_over_eager": row["eager"]["gpu_seconds"] / seconds,
        }
    default = f"kernel mode `auto` of `{benchmark.name}`, now the kernel"
    slower = [name for name, row in cases.items() if row["speedup_over_eager"] < 1]
    return {"cases": cases, "decides": f"{default}; slower than eager at {slower or 'no shape'}"}


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
