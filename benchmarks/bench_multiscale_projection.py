"""The multiscale projection at the shapes of DC-AE's attention blocks, at 1024 and at 4096 pixels.

python -m benchmarks.kernel_benchmark multiscale_projection
"""

import torch
from torch.nn import functional as F

from benchmarks.kernel_benchmark import Case, KernelBenchmark, Tensors
from diffusers_sana.kernels.multiscale_projection import multiscale_projection


GROUP_SIZE, KERNEL_SIZE = 32, 5


def case(channels: int, side: int) -> Case:
    """One attention block at one resolution."""

    def make(device: str, dtype: torch.dtype) -> Tensors:
        return {
            "hidden_states": torch.randn(1, side, side, channels, device=device, dtype=dtype),
            "depthwise_weight": torch.randn(channels, 1, KERNEL_SIZE, KERNEL_SIZE, device=device, dtype=dtype),
            "pointwise_weight": torch.randn(channels, GROUP_SIZE, 1, 1, device=device, dtype=dtype),
        }

    elements = side * side * channels
    num_flops = 2 * (KERNEL_SIZE**2 + GROUP_SIZE) * elements
    return Case(f"dc-ae {side}x{side}x{channels}", make, num_bytes=4 * elements, num_flops=num_flops)


def eager(hidden_states, depthwise_weight, pointwise_weight):
    """What a model does without the operation: the input's dtype throughout."""
    channels, group_size = pointwise_weight.shape[:2]
    out = F.conv2d(hidden_states.movedim(-1, 1), depthwise_weight, padding=KERNEL_SIZE // 2, groups=channels)
    return F.conv2d(out, pointwise_weight, groups=channels // group_size).movedim(1, -1)


def forward(hidden_states, depthwise_weight, pointwise_weight):
    from diffusers_sana.kernels.triton.multiscale_projection import multiscale_projection_forward

    multiscale_projection_forward(hidden_states, depthwise_weight, pointwise_weight)


def backward(hidden_states, depthwise_weight, pointwise_weight):
    from diffusers_sana.kernels.triton.multiscale_projection import multiscale_projection_backward

    multiscale_projection_backward(hidden_states, depthwise_weight, pointwise_weight, hidden_states.dtype)


BENCHMARK = KernelBenchmark(
    multiscale_projection,
    cases=[case(3072, 32), case(3072, 64), case(1536, 128), case(3072, 128), case(1536, 512)],
    launches=[forward, backward],
    tiny=case(32, 4),
    eager=eager,
)
