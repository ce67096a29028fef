"""Which implementation of an operation runs: the Triton kernel or the PyTorch reference.

The mode is `auto` (the kernel wherever it can run), `triton` (the kernel, or an error that says why not) or `torch`
(the reference). It comes from the environment variable `DIFFUSERS_SANA_KERNELS`, or from `kernel_mode` for a block of
code.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from diffusers.utils import logging
from torch import Tensor

from diffusers_sana._compat import triton_refusal


logger = logging.get_logger(__name__)

ENVIRONMENT_VARIABLE = "DIFFUSERS_SANA_KERNELS"
MODES = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)  # the oldest NVIDIA architecture that the kernels are compiled for in the tests

# Asked once: `torch.compile` traces what depends on it, and could not trace the question.
_TRITON_REFUSAL = triton_refusal()
# The interpreter runs kernels on CPU tensors, slowly: for tests, hence only when asked for by name.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _checked(mode: str, origin: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{origin} must be one of {MODES}, got {mode!r}.")
    return mode


_mode = _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), f"the environment variable {ENVIRONMENT_VARIABLE}")


def current_kernel_mode() -> str:
    """The mode in force: "auto", "triton" or "torch"."""
    return _mode


@contextmanager
def kernel_mode(mode: str) -> Iterator[None]:
    """Sets the mode for a block of code, for all threads.

    Args:
        mode: "auto", "triton" or "torch".

    Raises:
        ValueError: another name.
    """
    global _mode
    previous, _mode = _mode, _checked(mode, "`mode`")
    try:
        yield
    finally:
        _mode = previous


def use_triton(operation: str, *tensors: Tensor | None, unless: str | None = None) -> bool:
    """Whether `operation` is to run its Triton kernel on these tensors.

    Args:
        operation: name for messages.
        tensors: all tensor arguments.
        unless: why the kernel cannot take these shapes, or None if it can.

    Raises:
        RuntimeError: in mode "triton", if the kernel cannot run, with the reason.
    """
    if _mode == "torch":
        return False
    reason = unless or _refusal([tensor for tensor in tensors if tensor is not None])
    if reason is None:
        return True
    if _mode == "triton":
        raise RuntimeError(
            f"The kernel mode is 'triton' but `{operation}` cannot run its kernel: {reason}. Set the mode to 'auto'."
        )
    if not torch.compiler.is_compiling():
        _say_once(operation, reason)
    return False


def _refusal(tensors: list[Tensor]) -> str | None:
    device = tensors[0].device
    if _TRITON_REFUSAL is not None:
        return _TRITON_REFUSAL
    if any(tensor.device != device for tensor in tensors):
        return f"the tensors are on several devices, {sorted({str(tensor.device) for tensor in tensors})}"
    if device.type == "cpu":
        if not (_INTERPRETED and _mode == "triton"):
            return "the tensors are on the CPU"
    elif device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
            return f"the GPU's compute capability is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    elif device.type == "meta":
        if _mode != "triton":  # there the operators tell shapes, which counts the memory that a GPU would need
            return "the tensors have no data"
    elif device.type != "xpu":
        return f"there is no Triton for device {device.type!r}"
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"the dtype must be one of {[str(dtype) for dtype in DTYPES]}, got {tensor.dtype}"
    return None


@cache
def _say_once(operation: str, reason: str) -> None:
    logger.info(f"`{operation}` runs its PyTorch reference: {reason}.")
