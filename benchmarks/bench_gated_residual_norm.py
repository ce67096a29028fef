"""Residual connection and modulated norm in one kernel at the token counts of SANA 1.6B and 0.6B, guided.

python -m benchmarks.kernel_benchmark gated_residual_norm
"""

import torch

from benchmarks.kernel_benchmark import Case, KernelBenchmark, Tensors
from diffusers_sana.kernels.gated_residual import gated_residual
from diffusers_sana.kernels.gated_residual_norm import gated_residual_norm
from diffusers_sana.kernels.modulated_layer_norm import modulated_layer_norm


def case(channels: int, tokens: int, has_gate: bool = True) -> Case:
    """Between two blocks with the gate of the Mix-FFN, before the Mix-FFN without a gate."""

    def make(device: str, dtype: torch.dtype) -> Tensors:
        residual, hidden_states = (torch.randn(2, tokens, channels, device=device, dtype=dtype) for _ in range(2))
        modulation = torch.randn(2, 6, channels, device=device, dtype=dtype).chunk(6, dim=1)
        names = ("gate", "scale", "shift") if has_gate else ("scale", "shift")
        modulations = dict(zip(names, modulation, strict=False))
        return {"residual": residual, "hidden_states": hidden_states, "gate": None} | modulations

    elements = 2 * tokens * channels
    name = f"2x{tokens}x{channels}{'' if has_gate else ' without gate'}"
    return Case(name, make, num_bytes=8 * elements, num_flops=10 * elements)


def eager(residual, hidden_states, gate, scale, shift):
    """What the model did before there was this kernel."""
    total = residual + hidden_states if gate is None else gated_residual(residual, hidden_states, gate)
    return total, modulated_layer_norm(total, scale, shift)


def forward(residual, hidden_states, gate, scale, shift):
    from diffusers_sana.kernels.triton.gated_residual_norm import gated_residual_norm_forward

    gated_residual_norm_forward(residual, hidden_states, gate, scale, shift, 1e-6)


BENCHMARK = KernelBenchmark(
    gated_residual_norm,
    cases=[case(2240, 1024), case(2240, 1024, has_gate=False), case(2240, 16384), case(1152, 256), case(1152, 1024)],
    launches=[forward],
    tiny=case(16, 8),
    eager=eager,
)
