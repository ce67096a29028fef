"""Microseconds that a call of an operation takes on the host, with the kernel left out: results/cpu/host_cost.json.

    python -m benchmarks.bench_host_cost

On a GPU small kernels end before the host has launched the next one. This times what the host does for it on tiny
tensors of a CPU: what the ways to register an operator of PyTorch cost, and what our operations cost, up to the
launcher, which only allocates the output. Triton's own launch is not in it. Processor time, the best of many rounds.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana.kernels import dispatch
from diffusers_sana.kernels.gated_residual import gated_residual
from diffusers_sana.kernels.gated_residual_norm import gated_residual_norm
from diffusers_sana.kernels.modulated_layer_norm import modulated_layer_norm
from diffusers_sana.kernels.triton import gated_residual as residual_launcher
from diffusers_sana.kernels.triton import gated_residual_norm as residual_norm_launcher
from diffusers_sana.kernels.triton import modulated_layer_norm as norm_launcher


ROUNDS, CALLS = 60, 40
LIBRARY = torch.library.Library("diffusers_sana_host_cost", "DEF")  # lives as long as its operators are called


def microseconds(function: Callable[[], Any]) -> float:
    """Of one call, by the processor time of this thread: the best of `ROUNDS` means over `CALLS` calls."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            function()
        best = min(best, (time.thread_time() - start) / CALLS)
    return round(best * 1e6, 1)


def registrations() -> dict[str, Callable[..., Tensor]]:
    """One operator, registered in each way that PyTorch has, and the function itself."""
    operators = torch.ops.diffusers_sana_host_cost

    def function(x: Tensor, y: Tensor, eps: float) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def in_library(name: str, has_gradient: bool) -> Callable[..., Tensor]:
        LIBRARY.define(f"{name}(Tensor x, Tensor y, float eps) -> Tensor")
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        if has_gradient:
            torch.library.register_autograd(f"{LIBRARY.ns}::{name}", lambda ctx, grad: (grad, None, None), lib=LIBRARY)
        return getattr(operators, name).default

    custom_op = torch.library.custom_op(f"{LIBRARY.ns}::custom", function, mutates_args=())
    triton_op = torch.library.triton_op(f"{LIBRARY.ns}::triton", function, mutates_args=())
    for operator in (custom_op, triton_op):
        operator.register_autograd(lambda ctx, grad: (grad, None, None))
    return {
        "torch.library.triton_op": triton_op,
        "torch.library.custom_op": custom_op,
        "Library, with a gradient": in_library("with_gradient", True),
        "Library, without": in_library("without", False),
        "no operator": function,
    }


def operations() -> dict[str, Callable[[], Any]]:
    """Calls of our operations on tiny tensors."""
    x = torch.randn(2, 4, 64)
    gate, scale, shift = torch.randn(2, 3, 64).chunk(3, dim=1)
    return {
        "x + x": lambda: x + x,
        "gated_residual": lambda: gated_residual(x, x, gate),
        "modulated_layer_norm": lambda: modulated_layer_norm(x, scale, shift),
        "gated_residual_norm": lambda: gated_residual_norm(x, x, gate, scale, shift),
    }


def without_kernels() -> None:
    """Lets the operations run on the CPU with launchers that only allocate."""

    def one(x: Tensor, *_: Any) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    residual_launcher.gated_residual_forward = one
    norm_launcher.modulated_layer_norm_forward = one
    residual_norm_launcher.gated_residual_norm_forward = lambda x, *_: (one(x), one(x))
    dispatch._INTERPRETED = True  # the CPU counts as a device that has the kernels


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    without_kernels()
    x = torch.randn(2, 4, 64)
    report: dict[str, Any] = environment()
    with dispatch.kernel_mode("triton"):
        with torch.no_grad():
            ways = registrations().items()
            report["registration_us"] = {name: microseconds(partial(call, x, x, 1e-6)) for name, call in ways}
            report["operation_us"] = {name: microseconds(call) for name, call in operations().items()}
        # Then all calls go through the overload with a gradient, as those in `no_grad` did before there were two.
        report["operation_in_grad_mode_us"] = {name: microseconds(call) for name, call in operations().items()}
    write_results("host_cost", report, args.results)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
