"""Gated residual at the token counts of SANA 1.6B (2240 channels) and 0.6B (1152), guided.

python -m benchmarks.kernel_benchmark gated_residual
"""

import torch

from benchmarks.kernel_benchmark import Case, KernelBenchmark, Tensors
from diffusers_sana.kernels.gated_residual import gated_residual


def case(channels: int, tokens: int, channels_first: bool = False) -> Case:
    """The gate is a view into the six rows of a block's modulation."""

    def make(device: str, dtype: torch.dtype) -> Tensors:
        residual, hidden_states = (torch.randn(2, tokens, channels, device=device, dtype=dtype) for _ in range(2))
        if channels_first:
            hidden_states = torch.randn(2, channels, tokens, device=device, dtype=dtype).transpose(1, 2)
        gate = torch.randn(2, 6, channels, device=device, dtype=dtype).chunk(6, dim=1)[2]
        return {"residual": residual, "hidden_states": hidden_states, "gate": gate}

    elements = 2 * tokens * channels
    name = f"2x{tokens}x{channels}{' channels first' if channels_first else ''}"
    return Case(name, make, num_bytes=6 * elements, num_flops=2 * elements)


def eager(residual, hidden_states, gate):
    """What the model did before there was a kernel."""
    return torch.addcmul(residual, gate, hidden_states)


def forward(residual, hidden_states, gate):
    from diffusers_sana.kernels.triton.gated_residual import gated_residual_forward

    gated_residual_forward(residual, hidden_states, gate)


def backward(residual, hidden_states, gate):
    from diffusers_sana.kernels.triton.gated_residual import gated_residual_backward

    gated_residual_backward(residual, hidden_states, gate)


BENCHMARK = KernelBenchmark(
    gated_residual,
    cases=[
        case(2240, 1024),
        case(2240, 1024, channels_first=True),
        case(2240, 16384),
        case(1152, 256),
        case(1152, 1024),
    ],
    launches=[forward, backward],
    tiny=case(16, 8),
    eager=eager,
)
