"""The dtype that a device computes in, where it is not the dtype that a tensor is stored in.

Processors without instructions for half precision run its matrix products and convolutions element by element, six
times slower than fp32 (AVX2) or worse. There our operations convert to fp32, compute, and round once at the end:
faster, and closer to fp32. Weights stay half precision in memory; only the piece at work is converted.

The GPUs of Apple silicon ("mps") have no faster units for half precision, and Sana's products give grey images there
in fp16, so they are computed in fp32 too.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from diffusers_sana._compat import onednn_computes


# Asked once and here, where it cannot fail: `torch.compile` traces the look-up, and could not trace the question.
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


# Asked once: torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    filter(_has_autocast, ("cpu", "cuda", "hpu", "maia", "mps", "mtia", "npu", "xla", "xpu"))
)


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which operations on devices of this type keep the dtypes of their inputs."""
    return torch.autocast(device_type, enabled=False) if device_type in _AUTOCAST_DEVICES else nullcontext()


def is_inference(*tensors: Tensor | None) -> bool:
    """Whether no gradient is asked for and the code runs eagerly, so that temporaries may be overwritten."""
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors)
