"""Compiles every kernel ahead of time for every architecture, without a GPU, and reports registers and spills.

python -m benchmarks.compile_kernels [--first-case] [--out FILE]

Writes `benchmarks/results/compile/kernels.json`.
"""

import argparse
import json
import re
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from benchmarks.kernel_benchmark import load, operations


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one program may take, in KiB (CUDA programming guide, technical specifications; CDNA3 ISA).
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
RESULTS = Path(__file__).parent / "results" / "compile" / "kernels.json"


class _Driver:
    """Stands in for a GPU's driver: says what to compile for, and cannot launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compile_all(first_case: bool = False) -> list[dict[str, Any]]:
    """One row a kernel, shape and architecture; of each operation the first shape or all."""
    compiled: list[Any] = []

    def compile_only(kernel: JITFunction, grid: Any) -> Any:
        return lambda *args, **kwargs: compiled.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

    rows = []
    launch, JITFunction.__getitem__ = JITFunction.__getitem__, compile_only
    try:
        for architecture, target in TARGETS.items():
            driver.set_active(_Driver(target))
            for benchmark in map(load, operations()):
                for case in benchmark.cases[:1] if first_case else benchmark.cases:
                    for function in benchmark.launches:
                        compiled.clear()
                        function(**case.make("meta", benchmark.dtype))
                        rows += [
                            {
                                "operation": benchmark.name,
                                "case": case.name,
                                "architecture": architecture,
                                **resources(kernel, architecture),
                            }
                            for kernel in compiled
                        ]
    finally:
        JITFunction.__getitem__ = launch
    return rows


def resources(kernel: Any, architecture: str) -> dict[str, Any]:
    """Name, registers a thread, bytes spilled a thread, and shared memory a program."""
    if "amdgcn" in kernel.asm:
        assembly = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        spilled = 4 * sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        # What does not fit into registers goes to the stack frame or to local memory.
        spilled = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
    return {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_kib": kernel.metadata.shared / 1024,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--first-case", action="store_true", help="only the first shape of each operation")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message=".*TRITON_DEFAULT_FP_FUSION")
    report = {
        "command": "python -m benchmarks.compile_kernels",
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "shared_kib_limits": SHARED_KIB,
        "kernels": compile_all(args.first_case),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rows = report["kernels"]
    bad = [row for row in rows if row["spilled_bytes"] or row["shared_kib"] > SHARED_KIB[row["architecture"]]]
    for row in bad:
        print(f"spills or too much shared memory: {row}")
    print(f"{len(rows)} kernels compiled, {len(bad)} do not fit")


if __name__ == "__main__":
    main()
