"""Weights of layers that share their input to 4- or 8-bit weights with a low-rank branch (SVDQuant, arXiv 2411.05007).

    smooth = max|x|^a / max|weight|^b             per input channel (sections 4.1 and 4.2)
    W = weight * smooth                           outliers of the input move into the weight
    up @ down = argmin ||W - up @ down||          the largest singular directions, kept in 16 bit
    Q = round(W - up @ down)                      4 or 8 bit
    up @ down = argmin ||(W - Q - up @ down) L||  refitted to the rounding error

The last two lines are repeated. Rounding is not exact, so a round may also make it worse: the best is kept, and the
search ends where further rounds no longer pay.

The exponents a and b are searched, first coarsely and then around the best: the pair with the smallest error of the
layers' outputs for sample inputs wins, in the mode in which the layers will compute. Without samples, inputs are
assumed to be Gaussian with the same variance in all channels. Layers that share their input share `smooth`, so they
are decomposed together.

L L^T is the covariance of the inputs from calibration; without it, L = 1. The first branch ignores the inputs: it has
to leave a residual that is easy to round, also in directions that inputs seldom take. The covariance is that of 16-bit
inputs in all compute modes, because the branch always receives those.

With `rotation`, Q is rounded in a rotated basis, in which activations and weights of a group are spread evenly (see
`kernels/rotation.py`). "auto" searches smoothing factors with and without it, and takes the better.

Rounding with error compensation (GPTQ) fits the codes to the inputs. Where those have few directions or heavy tails it
fits their sample, and is worse for other inputs. So it is tried on a part of the calibration data, and is kept only
where it lowers the error for the other part.

Legend: N output features, K input features, Kp = K padded, r rank, S sample rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import encode_weight, pad_features, weight_scales
from diffusers_sana.kernels.rotation import rotate, rotation_tensor
from diffusers_sana.quantizers.svdquant.algorithm.gptq import Compensation
from diffusers_sana.quantizers.svdquant.algorithm.quantized_weight import QuantizedWeight
from diffusers_sana.quantizers.svdquant.algorithm.randomized_svd import randomized_svd, weighted_svd
from diffusers_sana.quantizers.svdquant.config import LayerConfig


SCORED_FEATURES = 512  # output features, at least, of each weight by which errors are measured
LEAST_GAIN = 0.005  # of the squared error, that a round has to bring
# Rounds in a row that may bring less. The error of the weight falls steadily; that of the output goes up and down.
PATIENCE = {"weight": 1, "output": 4}
COMPENSATED_ROUNDS = 5  # at most, with compensation, which takes much longer than rounding
SYNTHETIC_ROWS = 128
SAMPLE_ROWS = 256  # of calibration inputs by which a candidate is scored
EXPONENTS = (0.25, 0.5, 0.75, 1.0)  # of the first search
FINER_STEPS = {"default": (0.125,), "best": (0.125, 0.0625)}  # of those that follow
# x / smooth is scaled to this root mean square. Integers allow any scale; e4m3 scales of activations underflow below
# .002 and end at 448, and this is half way.
SMOOTHED_RMS = 8.0
# This fraction of its diagonal is added to the covariance, for inputs that calibration has not seen. Errors on
# held-out inputs change little between .1 and 1.
DAMPING = 0.3
# The same for GPTQ, which depends on it more; the better one is found on held-out inputs.
GPTQ_DAMPINGS = (0.3, 2.0)


class LayerReport(NamedTuple):
    """How accurate a quantized layer is.

    Attributes:
        exponents: (a, b) of the smoothing; (0, 0) is none.
        error: relative error of the output for the sample inputs, in `computed_in`, over `SCORED_FEATURES` features or
            more.
        naive_error: the same for plain rounding of weight and activations.
        computed_in: the mode for which the layer was fitted, such as "w4a8".
        gptq: whether the codes were rounded with error compensation.
        rotated: whether they are in a rotated basis.
    """

    exponents: tuple[float, float]
    error: float
    naive_error: float
    computed_in: str
    gptq: bool
    rotated: bool


@dataclass
class Inputs:
    """What is known about the inputs of a layer.

    Attributes:
        rows: a sample, `[S, K]`, fp32.
        covariance: for which the branch is fitted, `[K, K]`, fp32, up to a constant factor.
    """

    rows: Tensor
    covariance: Tensor


def scored_rows(weight: Tensor) -> slice:
    """The output features by which the error of a weight `[N, K]` is measured."""
    return slice(None, None, max(1, len(weight) // SCORED_FEATURES))


@dataclass
class Data:
    """Calibration data of layers that share their input.

    Attributes:
        rows: a sample of the inputs, `[S, K]`, fp32.
        largest: largest magnitude of each channel over all inputs, `[K]`; None without data.
        hessian: sum of `x x^T` over all inputs, `[K, K]`, or None.
    """

    rows: Tensor
    largest: Tensor | None = None
    hessian: Tensor | None = None

    def inputs(self) -> Inputs | None:
        """For the fit of the branch."""
        return None if self.hessian is None else Inputs(self.rows, damped(self.hessian, DAMPING))

    def split(self) -> tuple["Data", Tensor]:
        """A smaller part of the sample, and the data without it."""
        held_out = self.rows[::2]
        assert self.hessian is not None
        return replace(self, rows=self.rows[1::2], hessian=self.hessian - held_out.t() @ held_out), held_out


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
        hessian: sum of `x x^T` over all calibration data, of which `inputs` are a part, `[K, K]`; needed for
            `config.gptq`. With it the branch is optimal for such inputs.

    Returns:
        One `QuantizedWeight` and one `LayerReport` per weight.

    Raises:
        ValueError: NaN or infinity in an argument, a missing hessian, or float8.
    """
    if config.precision == "float8":
        raise ValueError(
            "`modules` must give layers to quantize a mode with 4-bit or int8 weights, such as 'w8a8': float8 layers "
            "are only read from files."
        )
    if config.gptq and hessian is None:
        raise ValueError("`gptq=True` needs calibration data: pass prompts to `quantize`, or set `gptq=False`.")
    arguments = {f"weights[{i}]": weight for i, weight in enumerate(weights)} | {"inputs": inputs, "hessian": hessian}
    for name, tensor in arguments.items():
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity. Convert the model in bf16 or fp32.")
    dtypes = [weight.dtype for weight in weights]
    full = [weight.float() for weight in weights]
    data = _data(full[0], config, inputs, largest, hessian)

    rotations = {"none": (False,), "hadamard": (True,), "auto": (False, True)}[config.rotation]
    bases = [_search_smoothing(full, dtypes, data, config, rotated) for rotated in rotations]
    basis = min(bases, key=lambda basis: basis.score)
    plain = LayerConfig(config.precision, 0, mode=config.mode)
    unsmoothed = _normalized(torch.ones_like(basis.smooth), data.rows)
    quantized, reports = [], []
    for weight, dtype in zip(full, dtypes, strict=True):
        damping = _gptq_damping(weight[scored_rows(weight)], basis, dtype, data, config)
        item = _fitted(weight, basis, dtype, data, config, [damping])[damping]
        rows = scored_rows(weight)
        naive = fit_weight(weight[rows], unsmoothed, dtype, plain)
        error, naive_error = (
            relative_error(part, weight[rows], data.rows, config.mode) for part in (item.rows(rows), naive)
        )
        quantized.append(item)
        report = LayerReport(
            basis.exponents, error, naive_error, config.mode, gptq=damping is not None, rotated=basis.rotated
        )
        reports.append(report)
    return quantized, reports


def _data(
    weight: Tensor, config: LayerConfig, inputs: Tensor | None, largest: Tensor | None, hessian: Tensor | None
) -> Data:
    """The calibration data on the device of the weight, or Gaussian inputs."""
    hessian = None if hessian is None else hessian.to(weight)
    if inputs is None:
        generator = torch.Generator().manual_seed(config.seed)
        return Data(torch.randn(SYNTHETIC_ROWS, weight.shape[1], generator=generator).to(weight), None, hessian)
    rows = inputs.to(weight)[:: max(1, len(inputs) // SAMPLE_ROWS)]
    return Data(rows, rows.abs().amax(0) if largest is None else largest.to(rows), hessian)


@dataclass
class Basis:
    """In which the weights of some layers are rounded.

    Attributes:
        smooth: `[K]`, fp32.
        exponents: (a, b), of which it is made.
        rotated: see `kernels/rotation.py`.
        score: squared error of the output over the scored features; lower is better.
    """

    smooth: Tensor
    exponents: tuple[float, float]
    rotated: bool
    score: float


def _search_smoothing(
    weights: list[Tensor], dtypes: list[torch.dtype], data: Data, config: LayerConfig, rotated: bool
) -> Basis:
    """The smoothing factors with the smallest output error, with rotation or without."""
    scored = [weight[scored_rows(weight)] for weight in weights]
    ones = torch.ones_like(weights[0][0])
    input_range = ones if data.largest is None else data.largest
    weight_range = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    quick, inputs = replace(config, refinements=min(config.refinements, 1)), data.inputs()

    def smoothing(a: float, b: float) -> Tensor:
        if config.precision == "int8" and a == b == 0:
            return ones  # no scale depends on the size of activations, and other runtimes have no smoothing factors
        smooth = _without_zeros(input_range).pow(a) / _without_zeros(weight_range).pow(b)
        return _normalized(smooth, data.rows).to(dtypes[0]).float()

    def score(a: float, b: float) -> float:
        smooth, error = smoothing(a, b), 0.0
        for weight, dtype in zip(scored, dtypes, strict=True):
            item = fit_weight(weight, smooth, dtype, quick, inputs, rotated)
            error += squared_error(item, weight, data.rows, config.mode)
        return error

    candidates, directions, steps = [(0.0, 0.0)], [(1, 0), (0, 1)], FINER_STEPS[config.quality]
    if config.smoothing == "none":
        steps = ()
    elif data.largest is None:  # nothing is known of the inputs: a would change nothing
        candidates, directions, steps = [(0.0, b) for b in (0.0, 0.5, 1.0)], [(0, 1)], (0.25, *steps)
    else:
        candidates += [*((a, 0.0) for a in EXPONENTS), *((a, 1 - a) for a in EXPONENTS if a < 1)]
    if len(candidates) == 1 and config.rotation != "auto":
        return Basis(smoothing(0.0, 0.0), (0.0, 0.0), rotated, score=0.0)  # there is no choice
    exponents, best = _pattern_search(score, candidates, directions, steps)
    return Basis(smoothing(*exponents), exponents, rotated, best)


def _pattern_search(
    score: Callable[[float, float], float],
    candidates: Sequence[tuple[float, float]],
    directions: Sequence[tuple[int, int]],
    steps: Sequence[float],
) -> tuple[tuple[float, float], float]:
    """The pair with the smallest score, and that score.

    First the best of `candidates` is found, then better neighbours of it, step by step.
    """
    scores = {pair: score(*pair) for pair in candidates}
    for step in steps:
        while True:
            a, b = best = min(scores, key=scores.__getitem__)
            around = [(a + sign * step * da, b + sign * step * db) for da, db in directions for sign in (-1, 1)]
            new = [pair for pair in around if pair not in scores and all(0 <= value <= 1 for value in pair)]
            scores |= {pair: score(*pair) for pair in new}
            if best == min(scores, key=scores.__getitem__):
                break
    best = min(scores, key=scores.__getitem__)
    return best, scores[best]


def _gptq_damping(weight: Tensor, basis: Basis, dtype: torch.dtype, data: Data, config: LayerConfig) -> float | None:
    """The damping with which error compensation has the smallest error on held-out inputs; None to do without."""
    if not config.tries_gptq or data.hessian is None:
        return None
    part, held_out = data.split()
    items = _fitted(weight, basis, dtype, part, config, [None, *GPTQ_DAMPINGS])
    errors = {damping: squared_error(item, weight, held_out, config.mode) for damping, item in items.items()}
    return min(errors, key=errors.__getitem__)


def _fitted(
    weight: Tensor,
    basis: Basis,
    dtype: torch.dtype,
    data: Data,
    config: LayerConfig,
    dampings: Sequence[float | None],
) -> dict[float | None, QuantizedWeight]:
    """The weight without error compensation (None), and with it for some dampings."""
    inputs = data.inputs()
    plain = fit_weight(weight, basis.smooth, dtype, config, inputs, basis.rotated)
    items: dict[float | None, QuantizedWeight] = {}
    for damping in dampings:
        if damping is None or inputs is None or data.hessian is None:
            items[damping] = plain
        else:
            items[damping] = compensated(weight, plain, config, inputs, damped(data.hessian, damping))
    return items


def fit_weight(
    weight: Tensor,
    smooth: Tensor,
    dtype: torch.dtype,
    config: LayerConfig,
    inputs: Inputs | None = None,
    rotated: bool = False,
) -> QuantizedWeight:
    """One weight under given smoothing factors.

    Args:
        weight: `[N, K]`, fp32.
        smooth: `[K]`, fp32, of values that `dtype` represents exactly.
        dtype: of scales and branch.
        config: how; `refinements` is the largest number of rounds.
        inputs: for which the branch is fitted; None for white smoothed inputs.
        rotated: whether the codes are those of the rotated weight.
    """
    smoothed = weight * smooth
    up, down = randomized_svd(smoothed, config.rank, config.seed)
    rotation = rotation_tensor(device=weight.device) if rotated else None
    item = _rounded(smoothed, up.to(dtype), (down / smooth).to(dtype), smooth, rotation, config, None)
    return _refined(smoothed, item, config, inputs, None, config.refinements)


def compensated(
    weight: Tensor, item: QuantizedWeight, config: LayerConfig, inputs: Inputs, covariance: Tensor
) -> QuantizedWeight:
    """A fitted weight with codes that compensate each other's errors (GPTQ), and a branch that fits them.

    Args:
        weight: `[N, K]`, fp32.
        item: from `fit_weight`.
        config, inputs: as there.
        covariance: of the inputs for whose outputs the codes are chosen, `[K, K]`, fp32, up to a constant factor.
    """
    smooth = item.smooth_factor.float()
    smoothed = weight * smooth
    covariance = covariance / smooth / smooth[:, None]
    if item.rotation is not None:
        covariance = rotate(rotate(covariance, item.rotation).t(), item.rotation)
    compensation = Compensation(covariance)
    item = _rounded_again(smoothed, item, config, compensation)
    rounds = min(config.refinements, COMPENSATED_ROUNDS)
    return _refined(smoothed, item, config, inputs, compensation, rounds)


def _refined(
    smoothed: Tensor,
    item: QuantizedWeight,
    config: LayerConfig,
    inputs: Inputs | None,
    compensation: Compensation | None,
    rounds: int,
) -> QuantizedWeight:
    """The best of some rounds: each refits the branch to the codes; all but the first round the weight again first."""
    if config.rank == 0 or rounds == 0:
        return item
    best, error, in_vain = item, float("inf"), 0
    patience, start = PATIENCE["weight" if inputs is None else "output"], None
    for index in range(rounds):
        if index > 0:
            item = _rounded_again(smoothed, item, config, compensation)
        item, left = _with_best_branch(smoothed, item, config, inputs, start)
        in_vain = 0 if left < error * (1 - LEAST_GAIN) else in_vain + 1
        if left < error:
            best, error = item, left
        if in_vain == patience:
            break
        start = item.proj_down.float()
    return best


def _with_best_branch(
    smoothed: Tensor, item: QuantizedWeight, config: LayerConfig, inputs: Inputs | None, start: Tensor | None
) -> tuple[QuantizedWeight, float]:
    """The same codes with the branch that is the best for them, and the squared error that is left.

    The error is that of the smoothed weight, or that of the output for the sample of inputs. `start` is `proj_down` of
    the round before: the new one is searched near it.
    """
    missing, smooth, dtype = smoothed - item.residual(), item.smooth_factor.float(), item.proj_up.dtype
    if inputs is None:
        start = None if start is None else start * smooth
        up, down = randomized_svd(missing, config.rank, config.seed, start)
        left = missing.square().sum() - up.square().sum()  # of a projection: the rows of `down` are orthonormal
        up, down = up.to(dtype), (down / smooth).to(dtype)
    else:
        missing /= smooth
        up, down = weighted_svd(missing, config.rank, config.seed, inputs.covariance, start)
        up, down, rows = up.to(dtype), down.to(dtype), scored_rows(missing)
        left = (inputs.rows @ (missing[rows] - up[rows].float() @ down.float()).t()).square().sum()
    return replace(item, proj_up=up, proj_down=down), left.item()


def _rounded(
    smoothed: Tensor,
    up: Tensor,
    down: Tensor,
    smooth: Tensor,
    rotation: Tensor | None,
    config: LayerConfig,
    compensation: Compensation | None,
) -> QuantizedWeight:
    """The weight with codes for the branch as it is stored, so that they also compensate the branch's rounding."""
    residual = smoothed - up.float() @ (down.float() * smooth)
    residual = pad_features(residual) if rotation is None else rotate(residual, rotation)
    wscales, wtscale = weight_scales(residual, config.precision, up.dtype)
    if compensation is None:
        qweight = encode_weight(residual, wscales, wtscale)
    else:
        qweight = compensation.codes(residual, wscales, wtscale)
    smooth = smooth.to(up.dtype, copy=True)  # a separate tensor per layer: layers that share it are saved one by one
    return QuantizedWeight(qweight, wscales, wtscale, smooth, down, up, rotation)


def _rounded_again(
    smoothed: Tensor, item: QuantizedWeight, config: LayerConfig, compensation: Compensation | None
) -> QuantizedWeight:
    """New codes for the branch of `item`."""
    smooth = item.smooth_factor.float()
    return _rounded(smoothed, item.proj_up, item.proj_down, smooth, item.rotation, config, compensation)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """A covariance with a fraction of its diagonal added."""
    return hessian + damping * hessian.diagonal().diag()


def squared_error(item: QuantizedWeight, weight: Tensor, rows: Tensor, mode: str) -> float:
    """Of the output for the given inputs `[S, K]`, in a compute mode."""
    return (item.output(rows, mode) - rows @ weight.t()).square().sum().item()


def relative_error(item: QuantizedWeight, weight: Tensor, rows: Tensor, mode: str) -> float:
    """The norm of the error of the output over that of the output; 0 for an output of zeros."""
    norm = (rows @ weight.t()).norm().item()
    return squared_error(item, weight, rows, mode) ** 0.5 / norm if norm > 0 else 0.0


def _without_zeros(magnitudes: Tensor) -> Tensor:
    """Ones in place of zeros, so that channels that are never used get the factor 1."""
    return torch.where(magnitudes == 0, 1.0, magnitudes)


def _normalized(smooth: Tensor, inputs: Tensor) -> Tensor:
    """`smooth` times the constant that scales the smoothed inputs to `SMOOTHED_RMS`."""
    rms = (inputs / smooth).square().mean().sqrt()
    return smooth * (rms / SMOOTHED_RMS) if rms > 0 else smooth
