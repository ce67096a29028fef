"""One weight to branch and codes, under given smoothing factors (SVDQuant, arXiv 2411.05007).

    W = weight * smooth                           outliers of the input move into the weight
    up @ down = argmin ||W - up @ down||          the largest singular directions, 16 bit
    Q = round(W - up @ down)                      4 bit
    up @ down = argmin ||(W - Q - up @ down) L||  again, for what 4 bits left over (`refinements`)

L L^T is the covariance of the inputs as calibration has seen them; without it, L = 1. The first branch does not look
at the inputs: it has to leave a residual that is easy to round, also in directions that inputs seldom take. The
covariance is that of 16-bit inputs in all modes, because those are what the branch is fed.

Legend: N output features, K input features, Kp = K padded, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import decode_weight, encode_weight, pad_features, weight_scales
from diffusers_sana.quantizers.svdquant.algorithm.gptq import gptq_codes
from diffusers_sana.quantizers.svdquant.algorithm.randomized_svd import randomized_svd, weighted_svd


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

    @property
    def uses_hessian(self) -> bool:
        """Whether calibration has to collect the products of inputs."""
        return self.gptq or (self.rank > 0 and self.refinements > 0)


def fit_weight(
    weight: Tensor, smooth: Tensor, dtype: torch.dtype, options: Options, covariance: Tensor | None = None
) -> QuantizedWeight:
    """Branch, then rounding; then `refinements` times the branch anew, and each time but the last the rounding.

    Args:
        weight: `[N, K]`, fp32.
        smooth: `[K]`, fp32, of values that `dtype` has.
        dtype: of scales and branch.
        options: how.
        covariance: of the inputs, `[K, K]`, fp32, up to a constant factor; None for white smoothed inputs.
    """
    smoothed = weight * smooth
    hessian = covariance / smooth / smooth[:, None] if options.gptq and covariance is not None else None
    up, down = randomized_svd(smoothed, options.rank, options.seed)
    item = _rounded(smoothed, up.to(dtype), (down / smooth).to(dtype), smooth, options, hessian)
    if options.rank == 0 or options.refinements == 0:
        return item
    error = _left_over(weight, item, covariance)
    for _ in range(options.refinements - 1):
        up, down = _branch(smoothed, item, options, covariance)
        again = _rounded(smoothed, up, down, smooth, options, hessian)
        left = _left_over(weight, again, covariance)
        if left >= error:
            break
        item, error = again, left
    up, down = _branch(smoothed, item, options, covariance)
    return replace(item, proj_up=up, proj_down=down)


def decoded(item: QuantizedWeight) -> Tensor:
    """What the codes stand for, `[N, K]`: the residual of the smoothed weight."""
    return decode_weight(item.qweight, item.wscales, item.wtscale)[:, : item.smooth_factor.shape[0]]


def _branch(
    smoothed: Tensor, item: QuantizedWeight, options: Options, covariance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`proj_up` and `proj_down` that are the best for the codes as they are."""
    missing, smooth, dtype = smoothed - decoded(item), item.smooth_factor.float(), item.proj_up.dtype
    if covariance is None:
        up, down = randomized_svd(missing, options.rank, options.seed)
        return up.to(dtype), (down / smooth).to(dtype)
    up, down = weighted_svd(missing / smooth, options.rank, options.seed, covariance)
    return up.to(dtype), down.to(dtype)


def _rounded(
    smoothed: Tensor, up: Tensor, down: Tensor, smooth: Tensor, options: Options, hessian: Tensor | None
) -> QuantizedWeight:
    """With codes for a branch as it is stored, so that they also make up for the branch's rounding."""
    residual = pad_features(smoothed - up.float() @ (down.float() * smooth))
    wscales, wtscale = weight_scales(residual, options.precision, up.dtype)
    if hessian is None:
        qweight = encode_weight(residual, wscales, wtscale)
    else:
        qweight = gptq_codes(residual, wscales, wtscale, hessian)
    smooth = smooth.to(up.dtype, copy=True)  # of its own: layers that share it are saved one by one
    return QuantizedWeight(qweight, wscales, wtscale, smooth, down, up)


def _left_over(weight: Tensor, item: QuantizedWeight, covariance: Tensor | None) -> float:
    """Squared error: of the smoothed weight, or of the output for inputs of the covariance."""
    smooth = item.smooth_factor.float()
    left = (weight - item.proj_up.float() @ item.proj_down.float()) * smooth - decoded(item)
    if covariance is None:
        return left.square().sum().item()
    left = left / smooth
    return ((left @ covariance) * left).sum().item()
