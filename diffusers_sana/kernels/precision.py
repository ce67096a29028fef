"""The dtype in which a device computes, where it differs from the dtype in which a tensor is stored.

Processors without half-precision instructions compute half-precision matrix products and convolutions element by
element, six times slower than fp32 (AVX2) or worse. There our operations convert to fp32, compute, and round once at
the end, which is faster and more accurate. Weights stay in half precision in memory; they are converted piece by
piece.

The GPUs of Apple silicon ("mps") are not faster in half precision, and Sana generates gray images there in fp16, so
they compute in fp32 too.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from diffusers_sana._compat import onednn_computes


# Evaluated once, because `torch.compile` can trace the lookup, but not the check.
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = {
    "cpu": {dtype: dtype if onednn_computes(dtype) else torch.float32 for dtype in _HALF},
    "mps": dict.fromkeys(_HALF, torch.float32),
}


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products and convolutions of `x` are computed: its own, or fp32 (see above)."""
    dtypes = _DTYPES.get(x.device.type)
    return x.dtype if dtypes is None else dtypes.get(x.dtype, x.dtype)


def _has_autocast(device_type: str) -> bool:
    try:
        return torch.amp.is_autocast_available(device_type)
    except RuntimeError:  # this PyTorch has no such device
        return False


# Evaluated once, because torch 2.11 cannot trace the check.
_AUTOCAST_DEVICES = frozenset(
    filter(_has_autocast, ("cpu", "cuda", "hpu", "maia", "mps", "mtia", "npu", "xla", "xpu"))
)


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which operations on devices of this type keep the dtypes of their inputs."""
    return torch.autocast(device_type, enabled=False) if device_type in _AUTOCAST_DEVICES else nullcontext()


def is_inference(*tensors: Tensor | None) -> bool:
    """Whether no gradient is required and the code runs eagerly, so that temporaries may be overwritten."""
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors)
