"""The dtype that a device computes in, where it is not the dtype that a tensor is stored in.

Processors without instructions for half precision run its matrix products and convolutions element by element, six
times slower than fp32 (AVX2) or worse. There our operations convert to fp32, compute, and round once at the end:
faster, and closer to fp32. Weights stay half precision in memory; only the piece at work is converted.
"""

import torch
from torch import Tensor

from diffusers_sana._compat import onednn_computes


# Asked once and here, where it cannot fail: `torch.compile` traces the look-up, and could not trace the question.
_CPU_DTYPES = {dtype: dtype if onednn_computes(dtype) else torch.float32 for dtype in (torch.bfloat16, torch.float16)}


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products and convolutions of `x` are computed: its own, or fp32 (see above)."""
    return _CPU_DTYPES.get(x.dtype, x.dtype) if x.device.type == "cpu" else x.dtype


def is_inference(*tensors: Tensor | None) -> bool:
    """Whether no gradient is asked for and the code runs eagerly, so that temporaries may be overwritten."""
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors)
