"""The gated depthwise convolution at the shapes of Sana's Mix-FFN and of DC-AE's GLUMBConv.

python -m benchmarks.kernel_benchmark glu_depthwise_conv
"""

import torch
from torch.nn import functional as F

from benchmarks.kernel_benchmark import Case, KernelBenchmark, Tensors
from diffusers_sana.kernels.glu_depthwise_conv import glu_depthwise_conv


def case(name: str, batch: int, side: int, features: int) -> Case:
    """One block at one resolution."""

    def make(device: str, dtype: torch.dtype) -> Tensors:
        return {
            "hidden_states": torch.randn(batch, side, side, 2 * features, device=device, dtype=dtype),
            "weight": torch.randn(2 * features, 1, 3, 3, device=device, dtype=dtype),
            "bias": torch.randn(2 * features, device=device, dtype=dtype),
        }

    outputs = batch * side * side * features
    return Case(f"{name} {batch}x{side}x{side}x{features}", make, num_bytes=6 * outputs, num_flops=50 * outputs)


def eager(hidden_states, weight, bias):
    """What a model does without the operation: the input's dtype throughout."""
    out = F.conv2d(F.silu(hidden_states).movedim(-1, 1), weight, bias, padding=1, groups=weight.shape[0])
    out, gate = out.movedim(1, -1).chunk(2, dim=-1)
    return out * F.silu(gate)


def forward(hidden_states, weight, bias):
    from diffusers_sana.kernels.triton.glu_depthwise_conv import glu_depthwise_conv_forward

    glu_depthwise_conv_forward(hidden_states, weight, bias)


def backward(hidden_states, weight, bias):
    from diffusers_sana.kernels.triton.glu_depthwise_conv import glu_depthwise_conv_backward

    grad = hidden_states[..., : hidden_states.shape[-1] // 2]
    glu_depthwise_conv_backward(grad, hidden_states, weight, bias)


BENCHMARK = KernelBenchmark(
    glu_depthwise_conv,
    cases=[
        case("sana-0.6b", 2, 32, 2880),
        case("sana-1.6b", 2, 32, 5600),
        case("sana-1.6b", 2, 128, 5600),
        case("dc-ae", 1, 128, 4096),
        case("dc-ae", 1, 256, 2048),
    ],
    launches=[forward, backward],
    tiny=case("tiny", 1, 4, 16),
    eager=eager,
)
