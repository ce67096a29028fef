"""Low-bit matrix products at the layers of SANA-1.6B and FLUX.1, beside the 16-bit product that they replace.

python -m benchmarks.kernel_benchmark lowbit_linear
"""

from functools import lru_cache

import torch
from torch.nn import functional as F

from benchmarks.gpu_timing import MAX_SETS
from benchmarks.kernel_benchmark import Case, KernelBenchmark, Tensors
from diffusers_sana.kernels.lowbit_linear import lowbit_linear


Operands = tuple[torch.Tensor, torch.Tensor]
GROUP_SIZES = {"int4": 64, "nvfp4": 16}


def case(
    model: str, tokens: int, features: int, outputs: int, precision: str, activation_format: str, rank: int = 32
) -> Case:
    """One linear layer."""

    def make(device: str, dtype: torch.dtype) -> Tensors:
        def scales(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
            return (torch.rand(rows, columns, device=device) + 0.5).to(dtype)

        groups = features // GROUP_SIZES.get(precision, features)
        if activation_format == "nvfp4":
            codes = torch.randint(0, 256, (tokens, features // 2), device=device, dtype=torch.uint8)
            token_scales = scales(tokens, groups, torch.float8_e4m3fn)
        else:
            codes = torch.randint(-7, 8, (tokens, features), device=device, dtype=torch.int8)
            token_scales = scales(tokens, 1 if activation_format == "int8" else groups, torch.float32)
        is_nvfp4 = precision == "nvfp4"
        if precision == "int8":
            qweight = torch.randint(-127, 128, (outputs, features), device=device, dtype=torch.int8)
            wscales = scales(outputs, 1, torch.float32)[:, 0]
        else:
            qweight = torch.randint(0, 256, (outputs, features // 2), device=device, dtype=torch.uint8)
            wscales = scales(outputs, groups, torch.float8_e4m3fn if is_nvfp4 else dtype)
        return {
            "codes": codes,
            "scales": token_scales,
            "low": torch.randn(tokens, rank, device=device),
            "qweight": qweight,
            "wscales": wscales,
            "wtscale": torch.ones(outputs, device=device, dtype=dtype) if is_nvfp4 else None,
            "proj_up": torch.randn(outputs, rank, device=device, dtype=dtype),
            "bias": torch.randn(outputs, device=device, dtype=dtype),
            "activation_format": activation_format,
        }

    code_bytes = tokens * features // (2 if activation_format == "nvfp4" else 1)
    num_bytes = code_bytes + outputs * features // (1 if precision == "int8" else 2) + 2 * tokens * outputs
    num_flops = 2 * tokens * outputs * (features + rank)
    name = f"{model} {tokens}x{features}x{outputs} {precision} x {activation_format}"
    return Case(name, make, num_bytes, num_flops)


@lru_cache(maxsize=MAX_SETS)
def half_operands(qweight: torch.Tensor, tokens: int, dtype: torch.dtype) -> Operands:
    """Activations and weight of the 16-bit product of that size, other ones for each set of inputs."""
    features = qweight.shape[1] * (1 if qweight.dtype == torch.int8 else 2)
    sizes = (tokens, features), (qweight.shape[0], features)
    return tuple(torch.randn(size, device=qweight.device, dtype=dtype) for size in sizes)


def eager(codes, qweight, proj_up, bias, **others):
    """What a model does without quantization."""
    return F.linear(*half_operands(qweight, codes.shape[0], proj_up.dtype), bias)


def forward(codes, scales, low, qweight, wscales, wtscale, proj_up, bias, activation_format):
    from diffusers_sana.kernels.triton.lowbit_linear import lowbit_linear_forward

    lowbit_linear_forward(codes, scales, low, qweight, wscales, wtscale, proj_up, bias, activation_format)


BENCHMARK = KernelBenchmark(
    lowbit_linear,
    cases=[
        case("sana-1.6b", 2048, 2240, 2240, "int4", "int8"),
        case("flux", 4608, 3072, 12288, "int4", "int8"),
        case("flux", 16, 3072, 12288, "int4", "int8"),
        case("flux", 4608, 3072, 12288, "int8", "int8", rank=0),
        case("flux", 16, 3072, 12288, "int8", "int8", rank=0),
        case("sana-1.6b", 2048, 2240, 2240, "nvfp4", "int8"),
        case("flux", 4608, 3072, 12288, "nvfp4", "int8"),
        case("sana-1.6b", 2048, 2240, 2240, "nvfp4", "nvfp4"),
        case("flux", 4608, 3072, 12288, "nvfp4", "nvfp4"),
        case("flux", 16, 3072, 12288, "nvfp4", "nvfp4"),
        case("flux", 4608, 3072, 12288, "int4", "int4"),
    ],
    launches=[forward],
    tiny=case("tiny", 16, 64, 32, "int4", "int8", rank=16),
    eager=eager,
)
