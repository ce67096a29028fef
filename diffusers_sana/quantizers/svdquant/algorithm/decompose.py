"""Weights of layers that share their input to 4-bit weights with a low-rank branch (SVDQuant, arXiv 2411.05007).

    smooth = max|x|^a / max|weight|^b             per input channel (sections 4.1 and 4.2)
    W = weight * smooth                           outliers of the input move into the weight
    up @ down = argmin ||W - up @ down||          the largest singular directions, kept in 16 bit
    Q = round(W - up @ down)                      4 bit
    up @ down = argmin ||(W - Q - up @ down) L||  refitted to the rounding error (`refinements` times)

The exponents a and b are searched: the pair with the smallest error of the layers' outputs for sample inputs wins,
with quantized activations where the layers use them. Without samples, inputs are assumed to be Gaussian with the same
variance in all channels. Layers that share their input share `smooth`, so they are decomposed together.

L L^T is the covariance of the inputs from calibration; without it, L = 1. The first branch ignores the inputs: it has
to leave a residual that is easy to round, also in directions that inputs seldom take. The covariance is that of 16-bit
inputs in all compute modes, because the branch always receives those.

Legend: N output features, K input features, Kp = K padded, r rank, S sample rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import (
    decode_e2m1,
    decode_weight,
    encode_weight,
    pad_features,
    unpack_nibbles,
    weight_scales,
)
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank_reference
from diffusers_sana.quantizers.svdquant.algorithm.gptq import gptq_codes
from diffusers_sana.quantizers.svdquant.algorithm.randomized_svd import randomized_svd, weighted_svd
from diffusers_sana.quantizers.svdquant.config import LayerConfig


SYNTHETIC_ROWS = 128
SAMPLE_ROWS = 256  # of calibration inputs by which a candidate is scored
SCORED_FEATURES = 512  # output features, at least, of each weight by which candidates are scored and errors reported
EXPONENTS = (0.25, 0.5, 0.75, 1.0)
# x / smooth is scaled to this root mean square. Integers allow any scale; e4m3 scales of activations underflow below
# .002 and end at 448, and this is half way.
SMOOTHED_RMS = 8.0
# This fraction of its diagonal is added to the covariance, for inputs that calibration has not seen. Errors on
# held-out inputs change little between .1 and 1.
DAMPING = 0.3


@dataclass
class QuantizedWeight:
    """The tensors of a quantized layer, under the names of its state dict.

    Attributes:
        qweight: uint8 `[N, Kp/2]`.
        wscales: `[N, Kp/G]`, 16 bit or e4m3.
        wtscale: `[N]`, or None for int4.
        smooth_factor: `[K]`.
        proj_down: `[r, K]`, for the raw input: already divided by `smooth_factor`.
        proj_up: `[N, r]`.
    """

    qweight: Tensor
    wscales: Tensor
    wtscale: Tensor | None
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "QuantizedWeight":
        """The inverse of `tensors`."""
        return cls(*(tensors.get(item.name) for item in fields(cls)))  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """By name, without those that are None."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """On another device."""
        return self.from_tensors({name: value.to(device) for name, value in self.tensors().items()})

    def rows(self, features: slice) -> "QuantizedWeight":
        """Only the given output features."""
        shared = {"smooth_factor", "proj_down"}
        values = self.tensors().items()
        return self.from_tensors({name: value if name in shared else value[features] for name, value in values})


class LayerReport(NamedTuple):
    """How accurate a quantized layer is.

    Attributes:
        exponents: (a, b) of the smoothing; (0, 0) is none.
        error: relative error of the output for the sample inputs, over `SCORED_FEATURES` features or more.
        naive_error: the same for plain rounding of weight and activations.
    """

    exponents: tuple[float, float]
    error: float
    naive_error: float


@torch.no_grad()
def decompose(
    weights: Sequence[Tensor],
    config: LayerConfig,
    inputs: Tensor | None = None,
    largest: Tensor | None = None,
    hessian: Tensor | None = None,
) -> tuple[list[QuantizedWeight], list[LayerReport]]:
    """Quantizes the weights of layers that share their input.

    Args:
        weights: `[N, K]` each, floating point, finite. Their dtype becomes that of scales and low-rank branch.
        config: how.
        inputs: sample rows `[S, K]`; None for Gaussian ones.
        largest: largest magnitude of each input channel over all calibration data, `[K]`; by default over `inputs`.
        hessian: sum of `x x^T` over all calibration data, `[K, K]`; needed for `config.gptq`. With it the branch is
            optimal for such inputs.

    Returns:
        One `QuantizedWeight` and one `LayerReport` per weight.

    Raises:
        ValueError: NaN or infinity in an argument, or a missing hessian.
    """
    if config.gptq and hessian is None:
        raise ValueError("`gptq=True` needs calibration data: pass prompts to `quantize`, or set `gptq=False`.")
    arguments = {f"weights[{i}]": weight for i, weight in enumerate(weights)} | {"inputs": inputs, "hessian": hessian}
    for name, tensor in arguments.items():
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity. Convert the model in bf16 or fp32.")
    dtypes = [weight.dtype for weight in weights]
    full = [weight.float() for weight in weights]
    features = full[0].shape[1]
    if inputs is None:
        generator = torch.Generator().manual_seed(config.seed)
        inputs = torch.randn(SYNTHETIC_ROWS, features, generator=generator).to(full[0].device)
        largest = None
    else:
        inputs = inputs.to(full[0].device, torch.float32)[:: max(1, len(inputs) // SAMPLE_ROWS)]
        largest = inputs.abs().amax(0) if largest is None else largest.to(inputs)

    scored_rows = [slice(None, None, max(1, len(weight) // SCORED_FEATURES)) for weight in full]
    scored = [weight[rows] for weight, rows in zip(full, scored_rows, strict=True)]
    covariance = None
    if hessian is not None:
        hessian = hessian.to(full[0])
        covariance = hessian + DAMPING * hessian.diagonal().diag()
    smooth, exponents = _search_smoothing(scored, full, dtypes, inputs, largest, config)
    quantized = [
        fit_weight(weight, smooth, dtype, config, covariance) for weight, dtype in zip(full, dtypes, strict=True)
    ]
    plain = LayerConfig(config.precision, 0, quantize_activations=config.quantize_activations)
    unsmoothed = _normalized(torch.ones_like(smooth), inputs)
    reports = []
    for weight, item, rows, dtype in zip(scored, quantized, scored_rows, dtypes, strict=True):
        target = inputs @ weight.t()
        error = _relative_error(_output(inputs, item.rows(rows), config), target)
        naive = fit_weight(weight, unsmoothed, dtype, plain)
        reports.append(LayerReport(exponents, error, _relative_error(_output(inputs, naive, plain), target)))
    return quantized, reports


def _search_smoothing(
    scored: list[Tensor],
    weights: list[Tensor],
    dtypes: list[torch.dtype],
    inputs: Tensor,
    largest: Tensor | None,
    config: LayerConfig,
) -> tuple[Tensor, tuple[float, float]]:
    """The smoothing factors with the smallest output error over the `scored` rows, and their exponents."""
    ones = torch.ones_like(weights[0][0])
    input_range = ones if largest is None else largest
    weight_range = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    if config.smoothing == "none":
        candidates = [(0.0, 0.0)]
    elif largest is None:
        candidates = [(0.0, 0.0), *((0.0, b) for b in EXPONENTS)]
    else:
        candidates = [(0.0, 0.0), *((a, 0.0) for a in EXPONENTS), *((a, 1 - a) for a in EXPONENTS if a < 1)]
    if len(candidates) == 1:
        return _normalized(ones, inputs).to(dtypes[0]).float(), candidates[0]

    targets = [inputs @ weight.t() for weight in scored]
    quick = replace(config, refinements=min(config.refinements, 1))
    best = (float("inf"), ones, (0.0, 0.0))
    for a, b in candidates:
        smooth = _without_zeros(input_range).pow(a) / _without_zeros(weight_range).pow(b)
        smooth = _normalized(smooth, inputs).to(dtypes[0]).float()
        error = 0.0
        for weight, dtype, target in zip(scored, dtypes, targets, strict=True):
            item = fit_weight(weight, smooth, dtype, quick)
            error += (_output(inputs, item, config) - target).square().sum().item()
        if error < best[0]:
            best = (error, smooth, (a, b))
    return best[1], best[2]


def fit_weight(
    weight: Tensor, smooth: Tensor, dtype: torch.dtype, config: LayerConfig, covariance: Tensor | None = None
) -> QuantizedWeight:
    """One weight under given smoothing factors: branch, then rounding, then the refinements.

    Each refinement refits the branch, and each but the last rounds again.

    Args:
        weight: `[N, K]`, fp32.
        smooth: `[K]`, fp32, of values that `dtype` represents exactly.
        dtype: of scales and branch.
        config: how.
        covariance: of the inputs, `[K, K]`, fp32, up to a constant factor; None for white smoothed inputs.
    """
    smoothed = weight * smooth
    hessian = covariance / smooth / smooth[:, None] if config.gptq and covariance is not None else None
    up, down = randomized_svd(smoothed, config.rank, config.seed)
    item = _rounded(smoothed, up.to(dtype), (down / smooth).to(dtype), smooth, config, hessian)
    if config.rank == 0 or config.refinements == 0:
        return item
    error = _squared_error(weight, item, covariance)
    for _ in range(config.refinements - 1):
        up, down = _fit_branch(smoothed, item, config, covariance)
        candidate = _rounded(smoothed, up, down, smooth, config, hessian)
        candidate_error = _squared_error(weight, candidate, covariance)
        if candidate_error >= error:
            break
        item, error = candidate, candidate_error
    up, down = _fit_branch(smoothed, item, config, covariance)
    return replace(item, proj_up=up, proj_down=down)


def _fit_branch(
    smoothed: Tensor, item: QuantizedWeight, config: LayerConfig, covariance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best `proj_up` and `proj_down` for given codes."""
    missing, smooth, dtype = smoothed - _decoded(item), item.smooth_factor.float(), item.proj_up.dtype
    if covariance is None:
        up, down = randomized_svd(missing, config.rank, config.seed)
        return up.to(dtype), (down / smooth).to(dtype)
    up, down = weighted_svd(missing / smooth, config.rank, config.seed, covariance)
    return up.to(dtype), down.to(dtype)


def _rounded(
    smoothed: Tensor, up: Tensor, down: Tensor, smooth: Tensor, config: LayerConfig, hessian: Tensor | None
) -> QuantizedWeight:
    """The weight with codes for the branch as it is stored, so that they also compensate the branch's rounding."""
    residual = pad_features(smoothed - up.float() @ (down.float() * smooth))
    wscales, wtscale = weight_scales(residual, config.precision, up.dtype)
    if hessian is None:
        qweight = encode_weight(residual, wscales, wtscale)
    else:
        qweight = gptq_codes(residual, wscales, wtscale, hessian)
    smooth = smooth.to(up.dtype, copy=True)  # a separate tensor per layer: layers that share it are saved one by one
    return QuantizedWeight(qweight, wscales, wtscale, smooth, down, up)


def _squared_error(weight: Tensor, item: QuantizedWeight, covariance: Tensor | None) -> float:
    """Of the smoothed weight, or of the output for inputs of the covariance."""
    smooth = item.smooth_factor.float()
    error = (weight - item.proj_up.float() @ item.proj_down.float()) * smooth - _decoded(item)
    if covariance is None:
        return error.square().sum().item()
    error = error / smooth
    return ((error @ covariance) * error).sum().item()


def _decoded(item: QuantizedWeight) -> Tensor:
    """The residual of the smoothed weight that the codes represent, `[N, K]`."""
    return decode_weight(item.qweight, item.wscales, item.wtscale)[:, : item.smooth_factor.shape[0]]


def _output(inputs: Tensor, item: QuantizedWeight, config: LayerConfig) -> Tensor:
    """The output of the layer, with activations quantized or not."""
    smooth = item.smooth_factor.float()
    smoothed = inputs / smooth
    if config.quantize_activations:
        codes, scales, low = quantize_lowrank_reference(inputs, smooth, item.proj_down, config.precision)
        if config.precision == "nvfp4":
            codes = decode_e2m1(unpack_nibbles(codes, 16))
        group_size = codes.shape[-1] // scales.shape[-1]
        smoothed = codes.float().unflatten(-1, (-1, group_size)) * scales.float()[..., None]
        smoothed = smoothed.flatten(-2)[:, : inputs.shape[1]]
    else:
        low = inputs @ item.proj_down.float().t()
    return torch.addmm(low @ item.proj_up.float().t(), smoothed, _decoded(item).t())


def _without_zeros(magnitudes: Tensor) -> Tensor:
    """Ones in place of zeros, so that channels that are never used get the factor 1."""
    return torch.where(magnitudes == 0, 1.0, magnitudes)


def _normalized(smooth: Tensor, inputs: Tensor) -> Tensor:
    """`smooth` times the constant that scales the smoothed inputs to `SMOOTHED_RMS`."""
    rms = (inputs / smooth).square().mean().sqrt()
    return smooth * (rms / SMOOTHED_RMS) if rms > 0 else smooth


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    norm = expected.norm()
    return ((actual - expected).norm() / norm).item() if norm > 0 else 0.0
