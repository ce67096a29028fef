"""`diffusers-sana env`: show what will run on this machine, and why."""

import argparse
import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata


# Extra -> what it is for. Left out are `dev`, `docs` and `publish`, which serve this package itself.
EXTRAS = {
    "train": "LoRA in all pipelines; training",
    "eval": "SSIM and plots of evaluations",
    "video": "videos as .mp4 (`diffusers-sana generate --video`)",
    "demo": "the web page of `diffusers-sana demo`",
    "data": "training data from the Hub and from Parquet files",
    "bits8": "training with 8-bit optimizers",
    "optimizers": "training with CAME, Lion, Prodigy or a schedule-free optimizer",
    "caption": "`clean_caption=True`",
    "ray": "prompt lists and serving on several machines, by Ray",
    "notebooks": "the notebooks in examples/",
    "triton": "Triton kernels, where there is a GPU and torch did not bring it",
}


def _memory() -> str:
    """Size of the main memory, if the system reports it."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return ""
    return f", {total:.1f} GiB of memory"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """This command has no options."""


def run(args: argparse.Namespace) -> None:
    """Shows what will run on this machine, and why."""
    import torch

    from diffusers_sana import __version__
    from diffusers_sana.kernels.cpu import int8_linear
    from diffusers_sana.kernels.dispatch import ENVIRONMENT_VARIABLE, current_kernel_mode, kernel_mode, use_triton
    from diffusers_sana.kernels.external import products_described
    from diffusers_sana.quantizers.svdquant.config import PRECISIONS
    from diffusers_sana.quantizers.svdquant.layers.compute_mode import best_mode, best_mode_reason

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'diffusers_sana':15} {__version__}")
    for package in ("torch", "diffusers", "transformers", "peft", "triton"):
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed = "not installed"
        print(f"{package:15} {installed}")
    print(f"{'python':15} {platform.python_version()} on {platform.platform()}")

    cpu = torch.backends.cpu.get_cpu_capability() + (" with VNNI" if int8_linear.levels() == 127 else "")
    print(f"{'processor':15} {cpu}, threads: {torch.get_num_threads()}{_memory()}")
    if device.type == "cuda":
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        name = torch.cuda.get_device_name()
        print(f"{'GPU':15} {name}, compute capability {capability}, {free:.1f} of {total:.1f} GiB free")
    else:
        print(f"{'GPU':15} none that PyTorch can use{_why_not(torch.version.cuda)}")

    mode = current_kernel_mode()
    runs, why = "PyTorch", "set by name" if mode == "torch" else "Triton needs a GPU"
    if mode != "torch" and device.type != "cpu":
        try:
            with kernel_mode("triton"):
                use_triton("any", torch.empty(1, device=device))
            runs, why = "Triton", "this GPU supports it"
        except RuntimeError as error:
            why = str(error)
    print(f"{'operations':15} {runs} in mode {mode!r} of {ENVIRONMENT_VARIABLE}: {why}")
    print(f"{'w4a4 products':15} {products_described(mode)}")
    for precision in PRECISIONS:
        print(f"{precision + ' layers':15} {best_mode(device, precision)}: {best_mode_reason(device, precision)}")
    for extra, purpose in EXTRAS.items():
        lacks = missing(extra)
        remedy = f'pip install "diffusers_sana[{extra}]", for {", ".join(lacks)}' if lacks else "installed"
        print(f"{'for more' if extra == 'train' else '':15} {purpose}: {remedy}")


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    return [package for package in _packages(extra) if not _is_installed(package)]


def _packages(extra: str) -> Iterator[str]:
    """Names of the packages that an extra asks for."""
    for requirement in metadata.requires("diffusers_sana") or ():
        package, _, marker = requirement.partition(";")
        if re.search(rf"""extra == ['"]{extra}['"]""", marker):
            yield re.match(r"[\w.-]+", package)[0]  # type: ignore[index]  # a requirement begins with a name


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _why_not(cuda: str | None) -> str:
    """What to install where there is an NVIDIA GPU that this build of PyTorch cannot use."""
    if shutil.which("nvidia-smi") is None or cuda is not None:
        return ""
    return "; this machine has nvidia-smi, but this PyTorch is a CPU build: see pytorch.org/get-started"
