"""The dtype that a device computes in, where it is not the dtype that a tensor is stored in.

Processors without instructions for half precision run its matrix products and convolutions element by element, six
times slower than fp32 (AVX2) or worse. There our operations convert to fp32, compute, and round once at the end:
faster, and closer to fp32. Weights stay half precision in memory; only the piece at work is converted.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def _cpu_has_native(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


_CPU_DTYPES = {dtype: dtype if _cpu_has_native(dtype) else torch.float32 for dtype in (torch.bfloat16, torch.float16)}


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products and convolutions of `x` are computed: its own, or fp32 (see above)."""
    return _CPU_DTYPES.get(x.dtype, x.dtype) if x.device.type == "cpu" else x.dtype


def is_inference(*tensors: Tensor | None) -> bool:
    """Whether no gradient is asked for and the code runs eagerly, so that temporaries may be overwritten."""
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors)
