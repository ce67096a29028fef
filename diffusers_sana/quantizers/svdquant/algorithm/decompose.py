"""Layers that share their input to their 4-bit form (SVDQuant, arXiv 2411.05007, sections 4.1 and 4.2).

`smooth` is `inputs^a / weights^b` per input channel, from largest magnitudes; a and b are searched by what the whole
layer then puts out for sample inputs, activation quantization included. Without samples, inputs are taken to be
Gaussian, alike in all channels.

Layers that share their input share `smooth`, so they are decomposed together.

Legend: N output features, K input features, Kp = K padded, r rank, S sample rows, L layers that share their input.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import decode_e2m1, unpack_nibbles
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank_reference
from diffusers_sana.quantizers.svdquant.algorithm.fit_weight import Options, QuantizedWeight, decoded, fit_weight


SYNTHETIC_ROWS = 128
SAMPLE_ROWS = 256  # of calibration inputs that a candidate is scored with
SCORED_FEATURES = 512  # output features, at least, of each weight by which candidates are scored and errors reported
EXPONENTS = (0.25, 0.5, 0.75, 1.0)
# x / smooth is brought to this root mean square. Any scale does for integers; e4m3 scales of activations underflow
# below .002 and end at 448, and this is half way.
SMOOTHED_RMS = 8.0
# This share of its diagonal is added to the covariance, for inputs that calibration has not seen. Errors of
# held-out inputs change little between .1 and 1.
DAMPING = 0.3


class LayerReport(NamedTuple):
    """How well a layer came through.

    Attributes:
        exponents: (a, b) of the smoothing; (0, 0) is none.
        error: relative error of the output for the sample inputs, of `SCORED_FEATURES` or more features.
        naive_error: the same for plain rounding of weight and activations.
    """

    exponents: tuple[float, float]
    error: float
    naive_error: float


def decompose(
    weights: Sequence[Tensor],
    options: Options,
    inputs: Tensor | None = None,
    largest: Tensor | None = None,
    hessian: Tensor | None = None,
) -> tuple[list[QuantizedWeight], list[LayerReport]]:
    """Quantizes the weights of layers that share their input.

    Args:
        weights: `[N, K]` each, floating point, finite. Their dtype is that of scales and low-rank branch.
        options: how.
        inputs: sample rows `[S, K]`; None for Gaussian ones.
        largest: largest magnitude of each input channel over all calibration data, `[K]`; by default over `inputs`.
        hessian: sum of `x x^T` over all calibration data, `[K, K]`; needed for `options.gptq`. With it the branch is
            the best for such inputs.

    Returns:
        One `QuantizedWeight` and one `LayerReport` a weight.

    Raises:
        ValueError: NaN or infinity in an argument, or a missing hessian.
    """
    if options.gptq and hessian is None:
        raise ValueError("`gptq=True` needs calibration data: pass prompts to `quantize`, or set `gptq=False`.")
    given = {f"weights[{i}]": weight for i, weight in enumerate(weights)} | {"inputs": inputs, "hessian": hessian}
    for name, tensor in given.items():
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity. Convert the model in bf16 or fp32.")
    dtypes = [weight.dtype for weight in weights]
    full = [weight.float() for weight in weights]
    features = full[0].shape[1]
    if inputs is None:
        generator = torch.Generator().manual_seed(options.seed)
        inputs = torch.randn(SYNTHETIC_ROWS, features, generator=generator).to(full[0].device)
        largest = None
    else:
        inputs = inputs.to(full[0].device, torch.float32)[:: max(1, len(inputs) // SAMPLE_ROWS)]
        largest = inputs.abs().amax(0) if largest is None else largest.to(inputs)

    some = [slice(None, None, max(1, len(weight) // SCORED_FEATURES)) for weight in full]
    scored = [weight[part] for weight, part in zip(full, some, strict=True)]
    covariance = None
    if hessian is not None:
        hessian = hessian.to(full[0])
        covariance = hessian + DAMPING * hessian.diagonal().diag()
    smooth, exponents = _search(scored, full, dtypes, inputs, largest, options)
    quantized = [
        fit_weight(weight, smooth, dtype, options, covariance) for weight, dtype in zip(full, dtypes, strict=True)
    ]
    plain = Options(options.precision, 0, quantize_activations=options.quantize_activations)
    unsmoothed = _normalized(torch.ones_like(smooth), inputs)
    reports = []
    for weight, item, part, dtype in zip(scored, quantized, some, dtypes, strict=True):
        target = inputs @ weight.t()
        error = _relative(_output(inputs, item.some(part), options), target)
        naive = fit_weight(weight, unsmoothed, dtype, plain)
        reports.append(LayerReport(exponents, error, _relative(_output(inputs, naive, plain), target)))
    return quantized, reports


def _search(
    scored: list[Tensor],
    weights: list[Tensor],
    dtypes: list[torch.dtype],
    inputs: Tensor,
    largest: Tensor | None,
    options: Options,
) -> tuple[Tensor, tuple[float, float]]:
    """The smoothing factors with the least output error in the `scored` parts of the weights, and their exponents."""
    ones = torch.ones_like(weights[0][0])
    of_inputs = ones if largest is None else largest
    of_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    if options.smoothing == "none":
        candidates = [(0.0, 0.0)]
    elif largest is None:
        candidates = [(0.0, 0.0), *((0.0, b) for b in EXPONENTS)]
    else:
        candidates = [(0.0, 0.0), *((a, 0.0) for a in EXPONENTS), *((a, 1 - a) for a in EXPONENTS if a < 1)]
    if len(candidates) == 1:
        return _normalized(ones, inputs).to(dtypes[0]).float(), candidates[0]

    targets = [inputs @ weight.t() for weight in scored]
    quick = replace(options, refinements=min(options.refinements, 1))
    best = (float("inf"), ones, (0.0, 0.0))
    for a, b in candidates:
        smooth = _clean(of_inputs).pow(a) / _clean(of_weights).pow(b)
        smooth = _normalized(smooth, inputs).to(dtypes[0]).float()
        error = 0.0
        for weight, dtype, target in zip(scored, dtypes, targets, strict=True):
            item = fit_weight(weight, smooth, dtype, quick)
            error += (_output(inputs, item, options) - target).square().sum().item()
        if error < best[0]:
            best = (error, smooth, (a, b))
    return best[1], best[2]


def _clean(magnitudes: Tensor) -> Tensor:
    """Without zeros: a channel that is never used is left alone."""
    return torch.where(magnitudes == 0, 1.0, magnitudes)


def _normalized(smooth: Tensor, inputs: Tensor) -> Tensor:
    """`smooth` times the constant that brings the smoothed inputs to `SMOOTHED_RMS`."""
    rms = (inputs / smooth).square().mean().sqrt()
    return smooth * (rms / SMOOTHED_RMS) if rms > 0 else smooth


def _output(inputs: Tensor, item: QuantizedWeight, options: Options) -> Tensor:
    """What the layer would put out, activations quantized or not."""
    smooth = item.smooth_factor.float()
    smoothed = inputs / smooth
    if options.quantize_activations:
        codes, scales, low = quantize_lowrank_reference(inputs, smooth, item.proj_down, options.precision)
        if options.precision == "nvfp4":
            codes = decode_e2m1(unpack_nibbles(codes, 16))
        group_size = codes.shape[-1] // scales.shape[-1]
        smoothed = codes.float().unflatten(-1, (-1, group_size)) * scales.float()[..., None]
        smoothed = smoothed.flatten(-2)[:, : inputs.shape[1]]
    else:
        low = inputs @ item.proj_down.float().t()
    return torch.addmm(low @ item.proj_up.float().t(), smoothed, decoded(item).t())


def _relative(actual: Tensor, expected: Tensor) -> float:
    norm = expected.norm()
    return ((actual - expected).norm() / norm).item() if norm > 0 else 0.0
