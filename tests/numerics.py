"""The only home of tolerances: how far an output may be from its reference, and why."""

import torch
from torch import Tensor


FP32_RELATIVE_ERROR = 1e-5  # one forward of a model, equal weights, other order of summation


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`||actual - expected|| / ||expected||` in float64."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_close_fp32(actual: Tensor, expected: Tensor, tolerance: float = FP32_RELATIVE_ERROR) -> None:
    """Both fp32, both finite, equal but for the order of summation."""
    assert actual.isfinite().all(), "output is not finite"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def assert_no_worse(actual: Tensor, eager: Tensor, reference: Tensor, factor: float = 1.1) -> None:
    """`actual` (half precision) errs at most `factor` times what `eager`, the peer in the same dtype, errs."""
    assert actual.isfinite().all(), "output is not finite"
    ours, theirs = relative_error(actual, reference), relative_error(eager, reference)
    ulp = torch.finfo(actual.dtype).eps
    assert ours <= factor * theirs + ulp / 2, f"error {ours:.2e} against the peer's {theirs:.2e}"


def assert_kernel(actual: Tensor, eager: Tensor, reference: Tensor, what: str = "output") -> None:
    """`actual`, of a kernel, errs at most twice what `eager` errs against `reference` in float64, plus one unit."""
    assert actual.dtype == eager.dtype, f"{what} is {actual.dtype}, expected {eager.dtype}"
    assert actual.isfinite().all(), f"{what} is not finite"
    ours, theirs = relative_error(actual, reference), relative_error(eager, reference)
    ulp = torch.finfo(actual.dtype).eps
    assert ours <= 2 * theirs + ulp, f"{what} errs {ours:.2e} against eager's {theirs:.2e}"
