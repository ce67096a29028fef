"""Which operations a model runs, by what, and how far the kernels among them are from their references.

An operation is a function of `kernels/` that has a Triton kernel, `<name>`, and a reference, `<name>_reference`. Calls
are watched through `sys.setprofile`, so models run unchanged.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from diffusers_sana import kernels
from diffusers_sana.kernels.cpu import int8_linear
from diffusers_sana.kernels.dispatch import current_kernel_mode, use_triton
from diffusers_sana.kernels.external import TOLERANCE, external_product
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLinear


FOLDER = Path(str(kernels.__file__)).parent
DIFFERING_CODES = 1e-3  # share of codes that may be rounded the other way, where a number lies between two


@dataclass
class KernelCheck:
    """One operation at one shape.

    Attributes:
        operation: its name.
        shapes: of its tensor arguments.
        dtype: of the first one that is a floating point number.
        runs: "Triton kernel", "CPU kernel", "PyTorch reference" or the name of another package.
        why: the reason, where the reference runs.
        calls: how often it was called.
        error: relative error of the worst output against the reference in float64; of codes and scales in 8 bits the
            share that differs. None where the reference runs.
        reference_error: the same of the reference in the dtype of the arguments.
        limit: of `error`: twice that of the reference and one unit in the last place; of another package what its
            first use allows.
    """

    operation: str
    shapes: list[list[int]]
    dtype: str
    runs: str
    why: str | None = None
    calls: int = 0
    error: float | None = None
    reference_error: float | None = None
    limit: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the kernel is as exact as it must be. NaN is not."""
        return self.error is None or self.limit is None or self.error <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"passed": self.passed}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`||actual - expected|| / ||expected||` in float64, on the CPU where the device has no float64."""
    device = "cpu" if actual.device.type == "mps" else actual.device
    actual, expected = actual.to(device).double(), expected.to(device).double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def operations() -> dict[CodeType, str]:
    """Names of the operations by their code."""
    names = sorted(path.stem for path in (FOLDER / "triton").glob("*.py") if (FOLDER / path.name).exists())
    functions = {name: getattr(import_module(f"diffusers_sana.kernels.{name}"), name, None) for name in names}
    return {function.__code__: name for name, function in functions.items() if inspect.isfunction(function)}


@contextmanager
def checked_kernels() -> Iterator[list[KernelCheck]]:
    """Fills the list with what runs in this thread during the block: one entry per operation and shape."""
    watcher = _Watcher(operations())
    previous = sys.getprofile()
    sys.setprofile(watcher)
    try:
        yield watcher.found
    finally:
        sys.setprofile(previous)


@dataclass
class _Watcher:
    """The function that Python calls at every call and return of a function."""

    names: dict[CodeType, str]
    found: list[KernelCheck] = field(default_factory=list)
    seen: dict[tuple, KernelCheck] = field(default_factory=dict)
    arguments: list[dict[str, Any]] = field(default_factory=list)  # of the operations that are being called

    def __call__(self, frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if code in self.names:
            if event == "call":
                self.arguments.append(dict(frame.f_locals))
            elif event == "return":
                arguments = self.arguments.pop()
                if value is not None:  # else it raised
                    self._record(self.names[code], arguments, value)
        elif event != "return":
            return
        elif code is use_triton.__code__ and self.arguments:
            self.arguments[-1]["why"] = None if value else _reason(frame.f_locals)
        elif code is external_product.__code__ and self.arguments and value is not None:
            self.arguments[-1]["package"] = frame.f_locals["package"]
        elif code is SVDQuantLinear.matmul_a8.__code__ and value is not None:
            layer, tokens = frame.f_locals["self"], frame.f_locals["tokens"]
            if tokens.device.type == "cpu" and int8_linear.is_supported() and layer.precision != "float8":
                self._check_int8(layer, tokens, value)

    def _entry(self, operation: str, tensors: dict[str, Any], options: Any, runs: str) -> tuple[KernelCheck, bool]:
        """The entry for these shapes, and whether it is new."""
        given = [tensor for tensor in tensors.values() if isinstance(tensor, Tensor)]
        dtype = next(tensor.dtype for tensor in given if tensor.is_floating_point())
        key = operation, runs, str(options), tuple((tensor.shape, tensor.dtype) for tensor in given)
        is_new = key not in self.seen
        if is_new:
            check = KernelCheck(operation, [list(tensor.shape) for tensor in given], str(dtype)[6:], runs)
            self.seen[key] = check
            self.found.append(check)
        self.seen[key].calls += 1
        return self.seen[key], is_new

    def _record(self, name: str, arguments: dict[str, Any], output: Any) -> None:
        why, package = arguments.pop("why", None), arguments.pop("package", None)
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        options = {key: value for key, value in arguments.items() if isinstance(value, str | int | float)}
        runs = package or ("PyTorch reference" if why else "Triton kernel")
        check, is_new = self._entry(name, tensors, options, runs)
        check.why = why
        if is_new and not why:
            reference = getattr(import_module(f"diffusers_sana.kernels.{name}"), f"{name}_reference")
            # What only concerns how the kernel goes about it is no argument of the reference.
            arguments = {key: arguments[key] for key in inspect.signature(reference).parameters if key in arguments}
            _compare(check, output, reference(**arguments), _in_float64(reference, arguments))
            check.limit = TOLERANCE if package else check.limit

    def _check_int8(self, layer: SVDQuantLinear, tokens: Tensor, output: Tensor) -> None:
        tensors = {"tokens": tokens, "qweight": layer.qweight}
        check, is_new = self._entry("int8_linear", tensors, layer.precision, "CPU kernel")
        if is_new:
            parts = (layer.qweight, layer.wscales, layer.wtscale, layer.smooth_factor, layer.proj_down)
            exact = int8_linear.int8_linear_reference(tokens, *parts, layer.proj_up, layer.bias, layer.rotation)
            _compare(check, output, exact.to(output.dtype), exact)
            # The products of each row are added in fp32.
            check.limit = max(check.limit or 0.0, 1e-5)


def _reason(arguments: dict[str, Any]) -> str:
    """Why `use_triton` said no, from its local variables."""
    return arguments.get("reason") or f"the kernel mode is {current_kernel_mode()!r}"


def _in_float64(reference: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The reference with every 16- and 32-bit argument in float64; those in 8 bits are codes and their scales."""

    def exact(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [exact(item) for item in value]
        is_number = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() > 1
        return value.double() if is_number else value

    arguments = {name: exact(value) for name, value in arguments.items()}
    if "dtype" in inspect.signature(reference).parameters:
        arguments["dtype"] = torch.float64
    return reference(**arguments)


def _compare(check: KernelCheck, actual: Any, eager: Any, exact: Any) -> None:
    """Fills in the errors of a kernel: those of the output whose error is largest in units of its limit."""
    outputs = [[value] if isinstance(value, Tensor) else list(value) for value in (actual, eager, exact)]
    worst = -1.0
    for ours, theirs, reference in zip(*outputs, strict=True):
        if ours.numel() == 0:
            continue
        if ours.element_size() == 1:
            error, reference_error = (
                (value.float() != reference.float()).double().mean().item() for value in (ours, theirs)
            )
            limit = DIFFERING_CODES
        else:
            error, reference_error = (relative_error(value, reference) for value in (ours, theirs))
            limit = 2 * reference_error + torch.finfo(ours.dtype).eps
        ratio = error / limit
        if not ratio <= worst:  # also NaN
            worst = ratio
            check.error, check.reference_error, check.limit = error, reference_error, limit
