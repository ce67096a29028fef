"""One weight to 4 bits under given smoothing factors: the low-rank branch, the rounding, and refits of the branch.

Rounding and branch are fitted in turn, each for the other as it is. The error of the weight, or of the output for
given inputs, falls most in the first rounds. Rounding is not exact, so a round may also make it worse: the best is
kept, and the search ends where further rounds no longer pay.

Legend: N output features, K input features, Kp = K padded, r rank, S sample rows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import encode_weight, pad_features, weight_scales
from diffusers_sana.quantizers.svdquant.algorithm.gptq import Compensation
from diffusers_sana.quantizers.svdquant.algorithm.quantized_weight import QuantizedWeight
from diffusers_sana.quantizers.svdquant.algorithm.randomized_svd import randomized_svd, weighted_svd
from diffusers_sana.quantizers.svdquant.config import LayerConfig


SCORED_FEATURES = 512  # output features, at least, of each weight by which errors are measured
LEAST_GAIN = 0.005  # of the squared error, that a round has to bring
# Rounds in a row that may bring less. The error of the weight falls steadily; that of the output goes up and down.
PATIENCE = {"weight": 1, "output": 4}
COMPENSATED_ROUNDS = 5  # at most, with compensation, which takes much longer than rounding


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


def fit_weight(
    weight: Tensor, smooth: Tensor, dtype: torch.dtype, config: LayerConfig, inputs: Inputs | None = None
) -> QuantizedWeight:
    """One weight under given smoothing factors.

    Args:
        weight: `[N, K]`, fp32.
        smooth: `[K]`, fp32, of values that `dtype` represents exactly.
        dtype: of scales and branch.
        config: how; `refinements` is the largest number of rounds.
        inputs: for which the branch is fitted; None for white smoothed inputs.
    """
    smoothed = weight * smooth
    up, down = randomized_svd(smoothed, config.rank, config.seed)
    item = _rounded(smoothed, up.to(dtype), (down / smooth).to(dtype), smooth, config, None)
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
    compensation = Compensation(covariance / smooth / smooth[:, None])
    item = _rounded(smoothed, item.proj_up, item.proj_down, smooth, config, compensation)
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
    """The best of some rounds: each refits the branch to the codes, and each but the first rounds anew before."""
    if config.rank == 0 or rounds == 0:
        return item
    best, error, in_vain = item, float("inf"), 0
    patience, start = PATIENCE["weight" if inputs is None else "output"], None
    for index in range(rounds):
        if index > 0:
            item = _rounded(smoothed, item.proj_up, item.proj_down, item.smooth_factor.float(), config, compensation)
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
    smoothed: Tensor, up: Tensor, down: Tensor, smooth: Tensor, config: LayerConfig, compensation: Compensation | None
) -> QuantizedWeight:
    """The weight with codes for the branch as it is stored, so that they also compensate the branch's rounding."""
    residual = pad_features(smoothed - up.float() @ (down.float() * smooth))
    wscales, wtscale = weight_scales(residual, config.precision, up.dtype)
    if compensation is None:
        qweight = encode_weight(residual, wscales, wtscale)
    else:
        qweight = compensation.codes(residual, wscales, wtscale)
    smooth = smooth.to(up.dtype, copy=True)  # a separate tensor per layer: layers that share it are saved one by one
    return QuantizedWeight(qweight, wscales, wtscale, smooth, down, up)
