"""Quantized weights back to 16 bit, at the layers of SANA-1.6B and FLUX.1.

python -m benchmarks.kernel_benchmark dequantize_weight
"""

import torch

from benchmarks.kernel_benchmark import Case, KernelBenchmark, Tensors
from diffusers_sana.kernels.dequantize_weight import dequantize_weight


def case(model: str, outputs: int, features: int, precision: str, rank: int = 32) -> Case:
    """One linear layer."""

    def make(device: str, dtype: torch.dtype) -> Tensors:
        is_nvfp4 = precision == "nvfp4"
        if precision == "int8":
            qweight = torch.randint(-127, 128, (outputs, features), device=device, dtype=torch.int8)
            wscales = torch.rand(outputs, device=device) + 0.5
        else:
            qweight = torch.randint(0, 256, (outputs, features // 2), device=device, dtype=torch.uint8)
            wscales = torch.rand(outputs, features // (16 if is_nvfp4 else 64), device=device) + 0.5
            wscales = wscales.to(torch.float8_e4m3fn if is_nvfp4 else dtype)
        return {
            "qweight": qweight,
            "wscales": wscales,
            "wtscale": torch.ones(outputs, device=device, dtype=dtype) if is_nvfp4 else None,
            "smooth_factor": torch.rand(features, device=device, dtype=dtype) + 0.5,
            "proj_down": torch.randn(rank, features, device=device, dtype=dtype),
            "proj_up": torch.randn(outputs, rank, device=device, dtype=dtype),
            "dtype": dtype,
        }

    elements = outputs * features
    stored_bytes = {"int4": 0.5 + 2 / 64, "nvfp4": 0.5 + 1 / 16, "int8": 1}[precision]
    num_bytes = int(elements * (stored_bytes + 2))
    return Case(f"{model} {outputs}x{features} {precision}", make, num_bytes, num_flops=elements * (2 * rank + 2))


def forward(qweight, wscales, wtscale, smooth_factor, proj_down, proj_up, dtype):
    from diffusers_sana.kernels.triton.dequantize_weight import dequantize_weight_forward

    dequantize_weight_forward(qweight, wscales, wtscale, smooth_factor, proj_down, proj_up, dtype)


BENCHMARK = KernelBenchmark(
    dequantize_weight,
    cases=[
        case(model, outputs, features, precision)
        for precision in ("int4", "nvfp4", "int8")
        for model, outputs, features in (("sana-1.6b", 2240, 2240), ("flux", 12288, 3072))
    ],
    launches=[forward],
    tiny=case("tiny", 32, 64, "int4", rank=16),
)
