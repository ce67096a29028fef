"""Which implementation of an operation runs: the Triton kernel or the PyTorch reference.

The mode is `auto` (the kernel wherever it can run), `triton` (the kernel, or an error that says why not), `torch`
(the reference), or the name of another package, whose products of quantized layers are used where it has them (see
`external.py`), and elsewhere `auto`. It is set by the environment variable `DIFFUSERS_SANA_KERNELS`, or by
`kernel_mode` for a block of code.

Kernels are operators of PyTorch (`triton_operator`, `operator`), so `torch.compile` keeps whole graphs.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from diffusers_sana._compat import triton_refusal, warn_if_untested


warn_if_untested("torch")

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "DIFFUSERS_SANA_KERNELS"
PACKAGES = {"comfy-kitchen": "comfy_kitchen", "flashinfer": "flashinfer"}  # their modules
MODES = ("auto", "triton", "torch", *PACKAGES)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)  # the oldest NVIDIA architecture that the kernels are compiled for in the tests

# Evaluated once, because `torch.compile` cannot trace the check.
_TRITON_REFUSAL = triton_refusal()
# The interpreter runs kernels on CPU tensors, slowly: for tests, hence only in mode "triton".
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _checked(mode: str, origin: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{origin} must be one of {MODES}, got {mode!r}.")
    return mode


_mode = _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), f"the environment variable {ENVIRONMENT_VARIABLE}")


def current_kernel_mode() -> str:
    """The current mode, one of `MODES`."""
    return _mode


@contextmanager
def kernel_mode(mode: str) -> Iterator[None]:
    """Sets the mode for a block of code, for all threads.

    Args:
        mode: "auto", "triton", "torch", "comfy-kitchen" or "flashinfer".

    Raises:
        ValueError: another name.
    """
    global _mode
    previous, _mode = _mode, _checked(mode, "`mode`")
    try:
        yield
    finally:
        _mode = previous


def use_triton(operation: str, *tensors: Tensor | None, unsupported: str | None = None) -> bool:
    """Whether `operation` runs its Triton kernel on these tensors.

    Args:
        operation: name for messages.
        tensors: all tensor arguments.
        unsupported: why the kernel does not support these arguments, or None if it does.

    Raises:
        RuntimeError: in mode "triton", if the kernel cannot run, with the reason.
    """
    if _mode == "torch":
        return False
    reason = unsupported or _unsupported_tensors([tensor for tensor in tensors if tensor is not None])
    if reason is None:
        return True
    if _mode == "triton":
        raise RuntimeError(
            f"The kernel mode is 'triton' but `{operation}` cannot run its kernel: {reason}. Set the mode to 'auto'."
        )
    if not torch.compiler.is_compiling():
        _log_once(operation, reason)
    return False


def _unsupported_tensors(tensors: list[Tensor]) -> str | None:
    """Why no kernel supports tensors of these devices and dtypes, or None if all do."""
    device = tensors[0].device
    if _TRITON_REFUSAL is not None:
        return _TRITON_REFUSAL
    if any(tensor.device != device for tensor in tensors):
        return f"the tensors are on several devices, {sorted({str(tensor.device) for tensor in tensors})}"
    if device.type == "cpu":
        if not (_INTERPRETED and _mode == "triton"):
            return "the tensors are on the CPU"
    elif device.type == "cuda":
        if _is_too_old(device):
            return f"the GPU's compute capability is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    elif device.type == "meta":
        if _mode != "triton":  # where the operators compute shapes, to measure the memory that a GPU would need
            return "the tensors have no data"
    elif device.type != "xpu":
        return f"there is no Triton for device {device.type!r}"
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"the dtype must be one of {[str(dtype) for dtype in DTYPES]}, got {tensor.dtype}"
    return None


@torch.compiler.assume_constant_result  # which `torch.compile` need not trace
def _is_too_old(device: torch.device) -> bool:
    return _has_old_architecture(device)


@cache  # PyTorch takes microseconds to say it, and every call of a kernel asks
def _has_old_architecture(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY


@cache
def _log_once(operation: str, reason: str) -> None:
    logger.info(f"`{operation}` runs its PyTorch reference: {reason}.")


def unsupported_modulation(hidden_states: Tensor, *modulation: Tensor) -> str | None:
    """Why a kernel does not support these shapes, or None for `[B, N, C]` with modulations `[B or 1, 1, C]`."""
    if hidden_states.ndim == 3 and hidden_states.numel() > 0:
        batch, _, channels = hidden_states.shape
        if all(tensor.shape in ((batch, 1, channels), (1, 1, channels)) for tensor in modulation):
            return None
    shapes = [list(tensor.shape) for tensor in modulation]
    return f"it takes [B, N, C] with a modulation [B or 1, 1, C], got {list(hidden_states.shape)} with {shapes}"


_NAMESPACE = "diffusers_sana"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def _register(
    schema: str, key: str, implementation: Callable[..., Any], empty_outputs: Callable[..., Any], autograd: Any = None
) -> Callable[..., Any]:
    """Registers an operator of PyTorch through `torch.library.Library`, with two overloads.

    `default` has a gradient, through a Python function that PyTorch calls at every call of the operator, also where no
    gradient is wanted. `inference` has none and takes less than half the time per call on the host; operators of
    `torch.library.custom_op` and `triton_op` take longer than either (`benchmarks/bench_host_cost.py`).

    Args:
        schema: such as "rms_norm_forward(Tensor hidden_states, float eps) -> Tensor".
        key: the dispatch key of the implementation.
        implementation: takes positional arguments in the order of the schema, as the operator does.
        empty_outputs: what `torch.compile` and the meta device call instead.
        autograd: `setup_context` and `backward` of `torch.library.register_autograd`; None: an error in the backward
            pass.

    Returns:
        A function that calls the overload for the current grad mode.
    """
    name, _, signature = schema.partition("(")

    def no_backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"the kernel `{name}` has no backward pass. Set the kernel mode to 'torch'.")

    for overload in (name, f"{name}.inference"):
        _LIBRARY.define(f"{overload}({signature}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(overload, implementation, key)
        torch.library.register_fake(f"{_NAMESPACE}::{overload}", empty_outputs, lib=_LIBRARY)
    setup_context, backward = autograd or (None, no_backward)
    torch.library.register_autograd(f"{_NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    packet = getattr(getattr(torch.ops, _NAMESPACE), name)
    default, inference = packet.default, packet.inference

    def call(*arguments: Any) -> Any:
        return (default if torch.is_grad_enabled() else inference)(*arguments)

    return call


def triton_operator(
    schema: str, autograd: tuple[Callable[..., Any], Callable[..., Any]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a Triton launcher as an operator of PyTorch; decorates the function that gives its empty outputs.

    The launcher is the function with the name of the operator in the file of `kernels/triton` with the name of the
    decorated function's file. It is imported at the first call. `torch.compile` and the meta device call the decorated
    function instead.

    Args:
        schema, autograd: see `_register`.

    Returns:
        A decorator that returns a function of the operator, of positional arguments in the order of the schema.
    """
    name = schema.partition("(")[0]

    def register(empty_outputs: Callable[..., Any]) -> Callable[..., Any]:
        path = f"{__package__}.triton.{empty_outputs.__module__.rpartition('.')[2]}"
        module = cache(lambda: import_module(path))

        def launch(*arguments: Any) -> Any:
            return getattr(module(), name)(*arguments)

        return _register(schema, "CompositeExplicitAutograd", launch, empty_outputs, autograd)

    return register


def operator(
    schema: str, empty_outputs: Callable[..., Any], key: str = "CPU"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers an implementation in Python as an operator, for what `torch.compile` cannot trace.

    Args:
        schema, empty_outputs, key: see `_register`.

    Returns:
        A decorator of the implementation that returns a function of the operator.
    """
    return lambda implementation: _register(schema, key, implementation, empty_outputs)
