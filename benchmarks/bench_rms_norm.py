"""RMS norm at the shapes of DC-AE's stages (with bias and residual) and of SANA-1.5's query norm.

python -m benchmarks.kernel_benchmark rms_norm
"""

import torch

from benchmarks.kernel_benchmark import Case, KernelBenchmark, Tensors
from diffusers_sana.kernels.rms_norm import rms_norm


def image_case(channels: int, side: int) -> Case:
    """The norm of one block of the autoencoder at one resolution."""

    def make(device: str, dtype: torch.dtype) -> Tensors:
        shape = (1, side, side, channels)
        image, residual = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        weight, bias = (torch.randn(channels, device=device, dtype=dtype) for _ in range(2))
        return {"hidden_states": image, "weight": weight, "bias": bias, "residual": residual}

    elements = side * side * channels
    return Case(f"dc-ae {side}x{side}x{channels}", make, num_bytes=6 * elements, num_flops=6 * elements)


def token_case(channels: int, tokens: int) -> Case:
    """The norm of queries over all heads."""

    def make(device: str, dtype: torch.dtype) -> Tensors:
        hidden_states = torch.randn(2, tokens, channels, device=device, dtype=dtype)
        return {"hidden_states": hidden_states, "weight": torch.randn(channels, device=device, dtype=dtype)}

    elements = 2 * tokens * channels
    return Case(f"sana-1.5 2x{tokens}x{channels}", make, num_bytes=4 * elements, num_flops=4 * elements)


def forward(hidden_states, weight, bias=None, residual=None):
    from diffusers_sana.kernels.triton.rms_norm import rms_norm_forward

    rms_norm_forward(hidden_states, weight, bias, residual, 1e-5)


def backward(hidden_states, weight, bias=None, residual=None):
    from diffusers_sana.kernels.triton.rms_norm import rms_norm_backward

    rms_norm_backward(hidden_states, hidden_states, weight, 1e-5)


BENCHMARK = KernelBenchmark(
    rms_norm,
    cases=[image_case(128, 1024), image_case(512, 256), image_case(1024, 32), token_case(2240, 1024)],
    launches=[forward, backward],
    tiny=image_case(16, 4),
)
