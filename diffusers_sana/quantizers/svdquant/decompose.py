"""One layer's weight to its 4-bit form (SVDQuant, arXiv 2411.05007, sections 4.1 and 4.2).

    W = weight * smooth                    outliers of the input move into the weight
    W ~ up @ down                          the largest singular directions, 16 bit
    R = W - up @ down                      4 bit
    up @ down ~ W - R                      once more, for what 4 bits left over (`refinements`)

`smooth` is `inputs^a / weights^b` per input channel, from largest magnitudes; a and b are searched by what the whole
layer then puts out for sample inputs, activation quantization included. Without samples, inputs are taken to be
Gaussian, alike in all channels.

Layers that share their input share `smooth`, so they are decomposed together.

Legend: N output features, K input features, Kp = K padded, r rank, S sample rows, L layers that share their input.
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
from diffusers_sana.quantizers.svdquant.gptq import damped_factor, gptq_codes
from diffusers_sana.quantizers.svdquant.randomized_svd import randomized_svd


SYNTHETIC_ROWS = 128
SAMPLE_ROWS = 256  # of calibration inputs that a candidate is scored with
SCORED_FEATURES = 512  # output features, at least, of each weight by which candidates are scored and errors reported
EXPONENTS = (0.25, 0.5, 0.75, 1.0)
# x / smooth is brought to this root mean square. Any scale does for integers; e4m3 scales of activations underflow
# below .002 and end at 448, and this is half way.
SMOOTHED_RMS = 8.0


@dataclass
class QuantizedWeight:
    """The tensors of a quantized layer, under the names of its state dict.

    Attributes:
        qweight: uint8 `[N, Kp/2]`.
        wscales: `[N, Kp/G]`, 16 bit or e4m3.
        wtscale: `[N]`, or None for int4.
        smooth_factor: `[K]`.
        proj_down: `[r, K]`, of the raw input: already divided by `smooth_factor`.
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
        """From what `tensors` returned."""
        return cls(*(tensors.get(item.name) for item in fields(cls)))  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """By name, without those that are None."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """On another device."""
        return self.from_tensors({name: value.to(device) for name, value in self.tensors().items()})

    def some(self, features: slice) -> "QuantizedWeight":
        """That of some of the output features."""
        shared = {"smooth_factor", "proj_down"}
        values = self.tensors().items()
        return self.from_tensors({name: value if name in shared else value[features] for name, value in values})


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


@dataclass(frozen=True)
class Options:
    """How to decompose; see `SVDQuantConfig`."""

    precision: str = "int4"
    rank: int = 32
    smoothing: str = "search"
    refinements: int = 2
    gptq: bool = False
    seed: int = 0
    quantize_activations: bool = True


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
        hessian: sum of `x x^T` over all calibration data, `[K, K]`; needed for `options.gptq`.

    Returns:
        One `QuantizedWeight` and one `LayerReport` a weight.

    Raises:
        ValueError: NaN or infinity in a weight or in the inputs, or a missing hessian.
    """
    if options.gptq and hessian is None:
        raise ValueError("`gptq=True` needs calibration data: pass prompts to `quantize`, or set `gptq=False`.")
    for name, tensor in (*((f"weights[{i}]", weight) for i, weight in enumerate(weights)), ("inputs", inputs)):
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
    smooth, exponents = _search(scored, full, dtypes, inputs, largest, options)
    quantized = [_quantize(weight, smooth, dtype, options) for weight, dtype in zip(full, dtypes, strict=True)]
    if options.gptq and hessian is not None:
        smoothed_hessian = hessian.to(smooth.device, torch.float32) / smooth / smooth[:, None]
        for i, (weight, item) in enumerate(zip(full, quantized, strict=True)):
            residual = pad_features(_residual(weight, item))
            item.qweight = gptq_codes(residual, item.wscales, item.wtscale, smoothed_hessian)
            if options.rank and options.refinements:
                quantized[i] = _refitted(weight * smooth, item, options, smoothed_hessian)
    plain = Options(options.precision, 0, quantize_activations=options.quantize_activations)
    unsmoothed = _normalized(torch.ones_like(smooth), inputs)
    reports = []
    for weight, item, part, dtype in zip(scored, quantized, some, dtypes, strict=True):
        target = inputs @ weight.t()
        error = _relative(_output(inputs, item.some(part), options), target)
        naive = _quantize(weight, unsmoothed, dtype, plain)
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
            item = _quantize(weight, smooth, dtype, quick)
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


def _quantize(weight: Tensor, smooth: Tensor, dtype: torch.dtype, options: Options) -> QuantizedWeight:
    """Branch, then rounding; then `refinements` times the branch anew, and each time but the last the rounding."""
    smoothed = weight * smooth
    up, down = randomized_svd(smoothed, options.rank, options.seed)
    item = _with_branch(smoothed, up, down, smooth, dtype, options.precision)
    if options.rank == 0 or options.refinements == 0:
        return item
    error = _left_over(weight, item)
    for _ in range(options.refinements - 1):
        up, down = randomized_svd(smoothed - _decoded(item), options.rank, options.seed)
        again = _with_branch(smoothed, up, down, smooth, dtype, options.precision)
        left = _left_over(weight, again)
        if left >= error:
            break
        item, error = again, left
    return _refitted(smoothed, item, options)


def _refitted(
    smoothed: Tensor, item: QuantizedWeight, options: Options, hessian: Tensor | None = None
) -> QuantizedWeight:
    """With the branch that is the best for the codes as they are: for white inputs, or for those of the hessian."""
    missing = smoothed - _decoded(item)
    if hessian is None:
        up, down = randomized_svd(missing, options.rank, options.seed)
    else:  # the error of the output is that of `missing @ factor`
        factor = damped_factor(hessian)
        up, down = randomized_svd(missing @ factor, options.rank, options.seed)
        down = torch.linalg.solve_triangular(factor, down, upper=False, left=False)
    dtype = item.proj_up.dtype
    return replace(item, proj_up=up.to(dtype), proj_down=(down / item.smooth_factor.float()).to(dtype))


def _left_over(weight: Tensor, item: QuantizedWeight) -> float:
    """Squared error of the residual's rounding."""
    return (_residual(weight, item) - _decoded(item)).square().sum().item()


def _with_branch(
    smoothed: Tensor, up: Tensor, down: Tensor, smooth: Tensor, dtype: torch.dtype, precision: str
) -> QuantizedWeight:
    """Rounds the branch to its storage first, so that the residual also makes up for that rounding."""
    up, down = up.to(dtype), (down / smooth).to(dtype)
    residual = pad_features(smoothed - up.float() @ (down.float() * smooth))
    wscales, wtscale = weight_scales(residual, precision, dtype)
    smooth = smooth.to(dtype, copy=True)  # of its own: layers that share it are saved one by one
    return QuantizedWeight(encode_weight(residual, wscales, wtscale), wscales, wtscale, smooth, down, up)


def _residual(weight: Tensor, item: QuantizedWeight) -> Tensor:
    """What is left for 4 bits, `[N, K]`."""
    smooth = item.smooth_factor.float()
    return (weight - item.proj_up.float() @ item.proj_down.float()) * smooth


def _decoded(item: QuantizedWeight) -> Tensor:
    return decode_weight(item.qweight, item.wscales, item.wtscale)[:, : item.smooth_factor.shape[0]]


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
    return torch.addmm(low @ item.proj_up.float().t(), smoothed, _decoded(item).t())


def _relative(actual: Tensor, expected: Tensor) -> float:
    norm = expected.norm()
    return ((actual - expected).norm() / norm).item() if norm > 0 else 0.0
