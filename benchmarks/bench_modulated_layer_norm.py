"""Modulated layer norm at the token counts of SANA 1.6B (2240 channels) and 0.6B (1152), guided.

python -m benchmarks.kernel_benchmark modulated_layer_norm
"""

import torch
from torch.nn import functional as F

from benchmarks.kernel_benchmark import Case, KernelBenchmark, Tensors
from diffusers_sana.kernels.modulated_layer_norm import modulated_layer_norm


def case(channels: int, tokens: int) -> Case:
    """The norm before self-attention: scale and shift are views into the six rows of a block's modulation."""

    def make(device: str, dtype: torch.dtype) -> Tensors:
        shift, scale = torch.randn(2, 6, channels, device=device, dtype=dtype).chunk(6, dim=1)[:2]
        hidden_states = torch.randn(2, tokens, channels, device=device, dtype=dtype)
        return {"hidden_states": hidden_states, "scale": scale, "shift": shift}

    elements = 2 * tokens * channels
    return Case(f"2x{tokens}x{channels}", make, num_bytes=4 * elements, num_flops=8 * elements)


def eager(hidden_states, scale, shift):
    """As diffusers has it, with three roundings."""
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6) * (1 + scale) + shift


def forward(hidden_states, scale, shift):
    from diffusers_sana.kernels.triton.modulated_layer_norm import modulated_layer_norm_forward

    modulated_layer_norm_forward(hidden_states, scale, shift, 1e-6)


def backward(hidden_states, scale, shift):
    from diffusers_sana.kernels.triton.modulated_layer_norm import modulated_layer_norm_backward

    modulated_layer_norm_backward(hidden_states, hidden_states, scale, 1e-6)


BENCHMARK = KernelBenchmark(
    modulated_layer_norm,
    cases=[case(2240, 1024), case(2240, 4096), case(2240, 16384), case(1152, 256), case(1152, 1024)],
    launches=[forward, backward],
    tiny=case(16, 8),
    eager=eager,
)
