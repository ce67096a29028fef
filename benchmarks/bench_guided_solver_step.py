"""Guidance and solver step of order 2 at the latents of Sana: 32 channels, 1/32 of the pixels a side.

python -m benchmarks.kernel_benchmark guided_solver_step
"""

import torch

from benchmarks.kernel_benchmark import Case, KernelBenchmark, Tensors
from diffusers_sana.kernels.guided_solver_step import guided_solver_step


SCALARS = {"guidance_scale": 4.5, "sigma": 0.6, "sample_weight": 0.9, "prediction_weights": (0.2, -0.1)}


def case(side: int, images: int) -> Case:
    """A transformer's output in half precision, channels last in memory."""
    shape = (images, 32, side // 32, side // 32)

    def make(device: str, dtype: torch.dtype) -> Tensors:
        model_output = torch.randn(2 * images, shape[2], shape[3], 32, device=device, dtype=dtype).movedim(-1, 1)
        sample, previous = (torch.randn(shape, device=device) for _ in range(2))
        return {"model_output": model_output, "sample": sample, "history": [previous], **SCALARS}

    elements = images * 32 * shape[2] * shape[3]
    return Case(f"{images}x{side}px", make, num_bytes=20 * elements, num_flops=10 * elements)


def forward(**arguments):
    from diffusers_sana.kernels.triton.guided_solver_step import guided_solver_step_forward

    guided_solver_step_forward(**arguments)


BENCHMARK = KernelBenchmark(
    guided_solver_step,
    cases=[case(512, 1), case(1024, 1), case(1024, 8), case(4096, 4)],
    launches=[forward],
    tiny=case(64, 1),
)
