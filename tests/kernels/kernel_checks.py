"""How every Triton kernel is held to its reference: on the GPU where there is one, else in the interpreter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.dispatch import kernel_mode
from tests.numerics import assert_kernel


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates where a GPU rounds to bfloat16, so bfloat16 is for GPUs.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]

Tensors = dict[str, Tensor | None]


def to_device(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: None if tensor is None else tensor.to(DEVICE, dtype) for name, tensor in tensors.items()}


def check_kernel(operation: Callable[..., Tensor], tensors: Tensors, backward: bool = True, **options: Any) -> None:
    """Output and, with `backward`, all gradients of `operation(**tensors, **options)` in mode "triton".

    Against the reference in float64, by the rule of `assert_kernel`. Twice, for equal bits.
    """
    cotangent = None

    def run(mode: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        nonlocal cotangent
        leaves = {}
        for name, tensor in tensors.items():
            if tensor is None:
                leaves[name] = None
                continue
            leaf = tensor.detach() if dtype is None else tensor.detach().to(dtype)
            leaves[name] = leaf.requires_grad_(backward)
        with kernel_mode(mode):
            output = operation(**leaves, **options)
            if cotangent is None:
                cotangent = torch.randn(output.shape, device=output.device)
            if not backward:
                return [output]
            inputs = [leaf for leaf in leaves.values() if leaf is not None]
            return [output.detach(), *torch.autograd.grad(output, inputs, cotangent.to(output.dtype))]

    names = ["output", *(f"gradient of {name}" for name, tensor in tensors.items() if tensor is not None)]
    actual, again, eager, reference = run("triton"), run("triton"), run("torch"), run("torch", torch.float64)
    for name, *results in zip(names, actual, again, eager, reference, strict=False):
        assert torch.equal(results[0], results[1]), f"{name} differs from run to run"
        assert_kernel(results[0], results[2], results[3], name)


def check_operator(operation: Callable[..., Tensor], tensors: Tensors, **options: Any) -> None:
    """Shapes, strides and dtypes that `torch.compile` is told, forward and backward, are those of the kernel."""
    leaves = {name: None if tensor is None else tensor.detach().requires_grad_() for name, tensor in tensors.items()}

    def function(*values: Tensor | None) -> Tensor:
        return operation(**dict(zip(leaves, values, strict=True)), **options)

    with kernel_mode("triton"):
        expected = function(*leaves.values())
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves.values())
        inputs = [leaf for leaf in leaves.values() if leaf is not None]
        grads = torch.autograd.grad(expected, inputs, torch.ones_like(expected))
        compiled_grads = torch.autograd.grad(compiled, inputs, torch.ones_like(compiled))
    assert torch.equal(compiled, expected)
    assert all(torch.equal(*pair) for pair in zip(compiled_grads, grads, strict=True))
