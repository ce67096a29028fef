"""Compiles every kernel ahead of time for every architecture, without a GPU, and reports registers and spills.

python -m benchmarks.compile_kernels [--first-case] [--reuse FILE] [--out FILE]

Writes `benchmarks/results/compile/kernels.json`. All of it takes ten minutes of one core; `--reuse` takes the rows of
an earlier table for kernels that are the same to the compiler.
"""

import argparse
import hashlib
import json
import re
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction, driver
from triton.runtime.jit import JITCallable

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
RESOURCES = ("kernel", "warps", "registers", "spilled_bytes", "shared_kib", "loops", "unswizzled_operands")
# Of Triton's intermediate representation, buffers in shared memory whose rows all start in the same bank.
UNSWIZZLED = re.compile(r"^(#shared\d*) = #ttg\.swizzled_shared<\{.*maxPhase = 1,", re.MULTILINE)
OPERAND = re.compile(r"ttg\.local_load .*, (#shared\d*), #smem.* -> tensor<.*#ttg\.dot_op<")
# Of SASS and of AMD's assembly.
LABEL = re.compile(r"(\.L\w+):")
INSTRUCTION = re.compile(r"(?:\s*/\*[0-9a-f]+\*/\s+|\t(?=[a-z]))(.+)")
BRANCH = re.compile(r"(?:BRA|s_branch|s_cbranch\w*)\b.*?(\.L\w+)")


class CompileOnlyDriver:
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


def compile_all(first_case: bool = False, known: Mapping[str, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """One row a kernel, shape and architecture.

    Args:
        first_case: of each operation only the first shape.
        known: rows by their "digest", which stand for kernels that are the same to the compiler.
    """
    known = known or {}
    launched: list[dict[str, Any]] = []
    architecture = ""

    def compile_only(kernel: JITFunction, grid: Any) -> Any:
        return lambda *args, **kwargs: launched.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

    def compile_if_new(
        kernel: JITFunction, key: Any, signature: Any, device: Any, constants: Any, *others: Any
    ) -> Any:
        options, attributes, _ = others
        in_memory = kernel.device_caches[device][0]
        source = ASTSource(kernel, signature, constants, attributes)
        name = digest(source, TARGETS[architecture], options)
        if name in known:
            # Rows that are older than a column lack it.
            resources = {column: known[name][column] for column in RESOURCES if column in known[name]}
        else:
            resources = resources_of(compile_it(kernel, key, signature, device, constants, *others), architecture)
        in_memory[key] = resources | {"digest": name}  # what the next launch of it gets
        return in_memory[key]

    rows = []
    launch, compile_it = JITFunction.__getitem__, JITFunction._do_compile
    JITFunction.__getitem__, JITFunction._do_compile = compile_only, compile_if_new
    try:
        for architecture, target in TARGETS.items():
            driver.set_active(CompileOnlyDriver(target))
            for benchmark in map(load, operations()):
                for case in benchmark.cases[:1] if first_case else benchmark.cases:
                    for function in benchmark.launches:
                        launched.clear()
                        function(**case.make("meta", benchmark.dtype))
                        rows += [
                            {
                                "operation": benchmark.name,
                                "case": case.name,
                                "architecture": architecture,
                                **kernel,
                            }
                            for kernel in launched
                        ]
    finally:
        JITFunction.__getitem__, JITFunction._do_compile = launch, compile_it
    return rows


def digest(source: ASTSource, target: GPUTarget, options: Any) -> str:
    """Names all that the result of a compilation depends on; where a kernel stands in its file is not part of it."""
    _forget_lines(source.fn)
    parts = (triton.__version__, str(target), source.hash(), options.hash())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _forget_lines(function: JITCallable) -> None:
    """Takes line numbers out of the hash of a function and of those that it may call."""
    if function.hash is None and function.starting_line_number != 0:
        function.starting_line_number = 0
        for value in function.__globals__.values():
            if isinstance(value, JITCallable):
                _forget_lines(value)


def resources_of(kernel: Any, architecture: str) -> dict[str, Any]:
    """The columns of `RESOURCES`: registers and spilled bytes a thread, shared memory a program; see also below."""
    if "amdgcn" in kernel.asm:
        assembly = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        spilled = 4 * sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            usage = _output_of("cuobjdump", "--dump-resource-usage", file.name)
            assembly = _output_of("nvdisasm", "--print-code", file.name)
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        # What does not fit into registers goes to the stack frame or to local memory.
        spilled = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
    return {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_kib": kernel.metadata.shared / 1024,
        "loops": loop_lengths(assembly),
        "unswizzled_operands": unswizzled_operands(kernel.asm["ttgir"]),
    }


def _output_of(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def loop_lengths(assembly: str) -> list[int]:
    """Instructions from each label to a branch back to it, but for the endless loop of one after the end of SASS."""
    places: dict[str, int] = {}
    count, lengths = 0, []
    for line in assembly.splitlines():
        if label := LABEL.match(line):
            places[label[1]] = count
        elif instruction := INSTRUCTION.match(line):
            count += 1
            branch = BRANCH.search(instruction[1])
            if branch and branch[1] in places:
                lengths.append(count - places[branch[1]])
    return [length for length in lengths if length > 1]


def unswizzled_operands(ttgir: str) -> int:
    """Reads of a matrix product's operands from buffers in shared memory without swizzling."""
    unswizzled = set(UNSWIZZLED.findall(ttgir))
    return sum(buffer in unswizzled for buffer in OPERAND.findall(ttgir))


def as_json(report: dict[str, Any]) -> str:
    """The report with a line per kernel: there are hundreds, and a change of one is to be a line in a diff."""
    head = json.dumps(report | {"kernels": []}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in report["kernels"])
    return head.replace('"kernels": []', f'"kernels": [\n{rows}\n ]') + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--first-case", action="store_true", help="only the first shape of each operation")
    parser.add_argument(
        "--reuse", type=Path, metavar="FILE", help="an earlier table, for kernels that have not changed"
    )
    args = parser.parse_args(argv)
    earlier = json.loads(args.reuse.read_text(encoding="utf-8"))["kernels"] if args.reuse else []
    known = {row["digest"]: row for row in earlier if "digest" in row}
    warnings.filterwarnings("ignore", message=".*TRITON_DEFAULT_FP_FUSION")
    report = {
        "command": "python -m benchmarks.compile_kernels",
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "shared_kib_limits": SHARED_KIB,
        "kernels": compile_all(args.first_case, known),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(as_json(report), encoding="utf-8")
    rows = report["kernels"]
    bad = [row for row in rows if row["spilled_bytes"] or row["shared_kib"] > SHARED_KIB[row["architecture"]]]
    for row in bad:
        print(f"spills or too much shared memory: {row}")
    reused = sum(row["digest"] in known for row in rows)
    print(f"{len(rows)} kernels, {reused} of them unchanged since {args.reuse}; {len(bad)} do not fit")


if __name__ == "__main__":
    main()
