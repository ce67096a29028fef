"""Rounding with second-order error compensation (GPTQ, arXiv 2210.17323).

Columns are rounded one after another, those with the largest inputs first. The remaining columns compensate the error
of each, as far as the inputs correlate. The scales are fixed in advance.

Legend: N output features, K input features, Kp = K padded.
"""

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import CODECS, group_scales, nonzero, pack_codes, padded, precision_of


BLOCK = 128
DAMPING = 0.01
MAX_ATTEMPTS = 16


class Compensation:
    """GPTQ for inputs of one covariance; it is factored once, for any number of weights.

    Args:
        hessian: sum of `x x^T` over the inputs, `[K, K]`, fp32, up to a constant factor. It is changed.

    Raises:
        ValueError: a hessian that no damping makes positive definite: the inputs were not finite.
    """

    def __init__(self, hessian: Tensor) -> None:
        padding = padded(len(hessian)) - len(hessian)
        hessian = torch.nn.functional.pad(hessian, (0, padding, 0, padding))
        diagonal = hessian.diagonal()
        self.unused = diagonal <= 0
        diagonal[self.unused] = 1.0
        self.order = diagonal.argsort(descending=True, stable=True)
        inverse = torch.cholesky_inverse(damped_factor(hessian[self.order][:, self.order]))
        self.upper = torch.linalg.cholesky(inverse, upper=True)

    def codes(self, residual: Tensor, wscales: Tensor, wtscale: Tensor | None) -> Tensor:
        """Codes as they are stored, under given scales: `[N, Kp/2]`, for int8 `[N, Kp]`.

        Args:
            residual: `[N, Kp]`, fp32.
            wscales, wtscale: as in `low_bit.py`.
        """
        precision = precision_of(wscales)
        encode, decode = CODECS[precision]
        scales = nonzero(group_scales(wscales, wtscale))
        scales = scales.repeat_interleave(residual.shape[1] // scales.shape[1], dim=1)

        # Transposed, so that a column is contiguous in memory.
        remaining = torch.where(self.unused, 0.0, residual)[:, self.order].t().contiguous()
        scales = scales[:, self.order].t().contiguous()
        codes = torch.empty_like(remaining, dtype=torch.int8 if precision == "int8" else torch.uint8)
        for start in range(0, len(remaining), BLOCK):
            block = slice(start, min(start + BLOCK, len(remaining)))
            columns, errors = remaining[block], torch.zeros_like(remaining[block])
            factor = self.upper[block, block]
            for i, scale in enumerate(scales[block]):
                code = encode(columns[i] / scale)
                codes[start + i] = code
                errors[i] = (columns[i] - decode(code).float() * scale) / factor[i, i]
                columns[i:] -= factor[i, i:, None] * errors[i]
            remaining[block.stop :] -= self.upper[block, block.stop :].t() @ errors
        return pack_codes(codes[self.order.argsort()].t().contiguous(), precision)


def damped_factor(hessian: Tensor) -> Tensor:
    """The lower Cholesky factor of a hessian `[K, K]`, damped until both it and its inverse have one.

    Raises:
        ValueError: no damping is enough: the inputs were not finite.
    """
    mean = hessian.diagonal().mean()
    for attempt in range(MAX_ATTEMPTS):
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (mean * DAMPING * 2.0**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if failed == 0 and upper.isfinite().all():
                return lower
    raise ValueError(f"the `hessian` of {len(hessian)} input channels cannot be inverted: the inputs were not finite.")
