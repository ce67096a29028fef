"""A cache of compiled kernels for a GPU that is not here, as one file that is carried to it.

    python -m benchmarks.warm_cache FILE [--architecture sm_90] [--operations rms_norm ...]

Compiles every kernel at every shape of the benchmarks, packs what Triton needs to load them, at most 16 MiB, and lets
a second process compile them all again with only that file: it must find each of them, or the command fails. On the
machine with the GPU, unpack it and set `TRITON_CACHE_DIR`. Triton finds a kernel there if the version of Triton, the
architecture, and the kernel's code and line number are the same, so make the cache with the version of that machine.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triton.runtime import JITFunction, driver

from benchmarks.compile_kernels import TARGETS, CompileOnlyDriver
from benchmarks.kernel_benchmark import load, operations


LIMIT_MIB = 16
NEEDED = (".json", ".cubin", ".hsaco")  # the other files of an entry are for those who read what was compiled


def entries(folder: Path) -> set[str]:
    """Names of the entries of a cache."""
    return {path.name for path in folder.iterdir()}


def compile_cases(architecture: str, names: Sequence[str]) -> None:
    """Compiles the kernels of operations as their launches on a GPU would, and ends with this process."""

    def compile_only(kernel: JITFunction, grid: Any) -> Any:
        return lambda *args, **kwargs: kernel.run(*args, grid=grid, warmup=True, **kwargs)

    JITFunction.__getitem__ = compile_only
    driver.set_active(CompileOnlyDriver(TARGETS[architecture]))
    for benchmark in map(load, names):
        for case in benchmark.cases:
            for function in benchmark.launches:
                function(**case.make("meta", benchmark.dtype))


def fill(folder: Path, architecture: str, names: Sequence[str]) -> None:
    """Compiles into a cache; in another process, as Triton keeps what it has compiled in this one."""
    code = "import sys; from benchmarks.warm_cache import compile_cases; compile_cases(sys.argv[1], sys.argv[2:])"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code, architecture, *names], env=environment, check=True)


def pack(folder: Path, file: Path) -> None:
    """Packs the needed files of a cache."""
    with tarfile.open(file, "w:xz") as archive:
        for path in sorted(folder.rglob("*")):
            if path.suffix in NEEDED:
                archive.add(path, path.relative_to(folder))


def make(file: Path, architecture: str, names: Sequence[str]) -> int:
    """Writes the file, and proves it; how many entries it has.

    Raises:
        RuntimeError: it is too large, or a second process compiles something again.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as carried:
        fill(Path(made), architecture, names)
        pack(Path(made), file)
        if file.stat().st_size > LIMIT_MIB * 2**20:
            size = file.stat().st_size / 2**20
            raise RuntimeError(
                f"The cache must be at most {LIMIT_MIB} MiB, got {size:.1f} MiB. Name fewer operations."
            )
        with tarfile.open(file) as archive:
            archive.extractall(carried, filter="data")
        before = entries(Path(carried))
        fill(Path(carried), architecture, names)
        if new := entries(Path(carried)) - before:
            raise RuntimeError(f"A second process compiled {len(new)} of {len(before)} entries again: {sorted(new)}.")
        return len(before)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="such as triton.tar.xz")
    parser.add_argument("--architecture", choices=TARGETS, default="sm_90")
    parser.add_argument("--operations", nargs="+", choices=operations(), default=operations(), metavar="NAME")
    args = parser.parse_args(argv)
    count = make(args.file, args.architecture, args.operations)
    size = args.file.stat().st_size / 2**20
    print(f"{args.file}: {count} kernels for {args.architecture}, {size:.1f} MiB, found by a second process")


if __name__ == "__main__":
    main()
