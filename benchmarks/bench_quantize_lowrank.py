"""Activation quantization and down projection at the layers of SANA-1.6B and FLUX.1, in the three formats.

python -m benchmarks.kernel_benchmark quantize_lowrank
"""

import torch

from benchmarks.kernel_benchmark import Case, KernelBenchmark, Tensors
from diffusers_sana.kernels.low_bit import reciprocal
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank


def case(model: str, tokens: int, features: int, activation_format: str, rank: int = 32) -> Case:
    """The input of one linear layer."""

    def make(device: str, dtype: torch.dtype) -> Tensors:
        return {
            "hidden_states": torch.randn(tokens, features, device=device, dtype=dtype),
            "smooth_factor": torch.rand(features, device=device, dtype=dtype) + 0.5,
            "proj_down": torch.randn(rank, features, device=device, dtype=dtype),
            "activation_format": activation_format,
        }

    code_bits = {"int8": 8, "int4": 8 + 32 / 64, "nvfp4": 4 + 8 / 16}[activation_format]
    num_bytes = int(tokens * features * (16 + code_bits) / 8) + tokens * rank * 4 + features * rank * 2
    num_flops = tokens * features * (2 * rank + 4)
    return Case(f"{model} {tokens}x{features} {activation_format}", make, num_bytes, num_flops)


def forward(hidden_states, smooth_factor, proj_down, activation_format):
    from diffusers_sana.kernels.triton.quantize_lowrank import quantize_lowrank_forward

    quantize_lowrank_forward(hidden_states, reciprocal(smooth_factor), proj_down, activation_format)


BENCHMARK = KernelBenchmark(
    quantize_lowrank,
    cases=[
        case("sana-1.6b", 2048, 2240, "int8"),
        case("flux", 4608, 3072, "int8"),
        case("flux", 4608, 15360, "int8"),
        case("flux", 4608, 3072, "int8", rank=160),
        case("sana-1.6b", 2048, 2240, "nvfp4"),
        case("flux", 4608, 3072, "nvfp4"),
        case("flux", 4608, 3072, "int4"),
    ],
    launches=[forward],
    tiny=case("tiny", 16, 64, "int8", rank=16),
)
