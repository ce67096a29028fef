"""What a figure must state of the machine that it was measured on; and how much memory a block of code takes."""

import contextlib
import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusers_sana._compat import version_of


PACKAGES = ("diffusers_sana", "torch", "diffusers", "transformers")
EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of processors that compute half precision


def versions() -> dict[str, str]:
    """Versions of this package, of its hosts and of Python."""
    return {**{package: version_of(package) for package in PACKAGES}, "python": platform.python_version()}


def device_name(device: str | None = None) -> str:
    """The name of a GPU, or of the processor with what it can do with half precision.

    Args:
        device: such as "cpu" or "cuda:1"; by default the GPU, if there is one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    extensions = [name for name in EXTENSIONS if f" {name} " in text]
    processor = names[0] if names else platform.processor() or platform.machine()
    processor = f"{processor} ({', '.join([f'{os.cpu_count()} cores', ' '.join(extensions)]).strip(', ')})"
    return processor if device == "cpu" else f"{device} on {processor}"


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def peak_memory(device: str | None = None) -> Iterator[dict[str, float]]:
    """Fills `mib` of the dictionary with the most memory in use during the block, beyond what was in use before it.

    On a CUDA device this is what torch allocated, on a CPU the resident size of the process. Elsewhere, also on CPUs
    without Linux, it stays empty.

    Args:
        device: such as "cpu" or "cuda:1"; by default the GPU, if there is one.
    """
    result: dict[str, float] = {}
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        synchronize()
        result["mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    elif device == "cpu" and _forget_high_water_mark():
        before = _status_kib("VmRSS")
        yield result
        result["mib"] = (_status_kib("VmHWM") - before) / 2**10
    else:
        yield result


def _forget_high_water_mark() -> bool:
    """Reset the largest resident size, and say whether the system can: Linux with glibc."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not serve the block unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except (OSError, AttributeError):
        return False
    return True


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").split("\n")
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
