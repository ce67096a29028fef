"""What the tests of SVDQuant's three operations share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.kernels.low_bit import E4M3_MAX, encode_weight, nonzero, pad_features, weight_scales
from tests.kernels.kernel_checks import DEVICE


PRECISIONS = ("int4", "nvfp4", "int8")


def quantized_weight(outputs: int, features: int, precision: str, dtype: torch.dtype = torch.float32) -> dict:
    """A random weight: one row and the first group of another are zero, and rows differ in size."""
    weight = torch.randn(outputs, features) * torch.logspace(-2, 1, outputs)[:, None]
    weight[-1] = 0
    weight[0, :64] = 0
    weight = pad_features(weight)
    if precision == "float8":
        wscales, wtscale = weight.abs().amax(1) / E4M3_MAX, None
        qweight = (weight / nonzero(wscales)[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        wscales, wtscale = weight_scales(weight, precision, dtype)
        qweight = encode_weight(weight, wscales, wtscale)
    parts = {"qweight": qweight, "wscales": wscales, "wtscale": wtscale}
    return {name: None if part is None else part.to(DEVICE) for name, part in parts.items()}


def bits(tensor: Tensor) -> Tensor:
    """To compare e4m3 too."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def check_compiled(operation: Callable[..., Any], tensors: dict[str, Any], **options: Any) -> None:
    """Shapes, strides and dtypes that `torch.compile` is told are the kernel's, and two runs give equal bits."""

    def function(*values: Tensor | None) -> tuple[Tensor, ...]:
        out = operation(**dict(zip(tensors, values, strict=True)), **options)
        return out if isinstance(out, tuple) else (out,)

    torch._dynamo.reset()  # it counts compilations of one piece of code, and this is one for all operations
    with kernel_mode("triton"):
        expected = function(*tensors.values())
        again = function(*tensors.values())
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors.values())
        told = function(*(None if x is None else x.to("meta") for x in tensors.values()))
    for out, same, also, fake in zip(expected, again, compiled, told, strict=True):
        assert torch.equal(bits(out), bits(same))
        assert torch.equal(bits(out), bits(also))
        assert (out.shape, out.stride(), out.dtype) == (fake.shape, fake.stride(), fake.dtype)
