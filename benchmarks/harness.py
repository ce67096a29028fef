"""What all benchmarks share: timing in turn, memory, and where results go."""

import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusers_sana.evaluation.machine import device_name, synchronize, versions


RESULTS = Path(__file__).parent / "results"


def alternate(functions: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each function, called in turn so that a change of the machine's pace meets all of them."""
    return {name: statistics.median(times) for name, times in alternating_times(functions, rounds, warmup).items()}


def alternating_times(
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call by `clock`, `rounds` a function, after `warmup` untimed rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warmup + rounds):
        for name, function in functions.items():
            synchronize()
            start = clock()
            function()
            synchronize()
            if i >= warmup:
                times[name].append(clock() - start)
    return times


def summary(times: dict[str, list[float]], baseline: str) -> dict[str, Any]:
    """Median seconds, and how many times faster ours is than `baseline`: the median over rounds, with its range."""
    ratios = sorted(theirs / ours for theirs, ours in zip(times[baseline], times["diffusers_sana"], strict=True))
    return {
        "rounds": len(ratios),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "speedup": statistics.median(ratios),
        "speedup_range": [ratios[0], ratios[-1]],
    }


def copy_bandwidth(device: str, elements: int = 2**30) -> float:
    """Bytes per second of a copy of bf16 elements, read and written: the bandwidth of a roofline."""
    x = torch.empty(elements, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / alternate({"copy": lambda: y.copy_(x)}, rounds=10, warmup=3)["copy"]


def commit() -> str:
    """The commit of the code: from git, or from the file that `tools/gpu_pack.py` writes, or ""."""
    packed = Path(__file__).parents[1] / "COMMIT"
    if packed.exists():
        return packed.read_text(encoding="utf-8").strip()
    if shutil.which("git") is None:
        return ""
    head = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(head, cwd=packed.parent, capture_output=True, text=True).stdout.strip()


def environment() -> dict[str, Any]:
    """What a result must state: device, versions, commit and command."""
    module = sys.modules["__main__"].__spec__
    command = f"python -m {module.name}" if module else Path(sys.argv[0]).name
    return {
        "command": " ".join([command, *map(shlex.quote, sys.argv[1:])]),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "versions": versions(),
    }


def named_by_processor(name: str) -> str:
    """`name`, and on a CPU with instructions for bf16 the best of these: their results stand beside those without."""
    if torch.cuda.is_available():
        return name
    found = [extension for extension in ("amx_bf16", "avx512_bf16") if extension in device_name("cpu")]
    return f"{name}-{found[0]}" if found else name


def write_results(name: str, report: dict[str, Any], results: Path = RESULTS) -> Path:
    """Writes `results/<device>/<name>.json`."""
    device = torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    path = results / device / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path
