"""One quantized layer in natural order: what every reader makes and every writer takes.

Codes are one per byte, so that padding, permuting and slicing are plain tensor operations. `UnpackedLayer.of`
takes our own layers apart and `to_quantized_weight` builds them.

Legend: N output features, K input features, G groups along K, r rank.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.dequantize_weight import dequantize_weight
from diffusers_sana.kernels.low_bit import (
    GROUP_SIZES,
    pack_nibbles,
    pad_features,
    padded,
    precision_of,
    unpack_codes,
)
from diffusers_sana.kernels.rotation import rotation_size, rotation_tensor
from diffusers_sana.quantizers.svdquant.algorithm.quantized_weight import QuantizedWeight
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer


logger = logging.getLogger(__name__)


class Source:
    """The tensors of a checkpoint; records which were read.

    Args:
        tensors: by key.
        origin: name of the checkpoint, for messages.
        base: 16-bit tensors of the model, for those that a checkpoint of quantized layers only leaves out.
    """

    def __init__(self, tensors: Mapping[str, Tensor], origin: str, base: Mapping[str, Tensor] | None = None) -> None:
        self.tensors, self.origin, self.base = tensors, origin, base or {}
        self._unread = set(tensors)

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def get(self, key: str, shape: Sequence[int] | None = None) -> Tensor | None:
        """A tensor, or None if there is none.

        Raises:
            ValueError: another shape.
        """
        tensor = self.tensors[key] if key in self.tensors else self.base.get(key)
        self._unread.discard(key)
        if tensor is not None and shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{key!r} must have shape {tuple(shape)}, got {tuple(tensor.shape)} in {self.origin}. "
                "The checkpoint is for a different architecture, or not in the layout that its names say."
            )
        return tensor

    def take(self, key: str, shape: Sequence[int] | None = None) -> Tensor:
        """A required tensor.

        Raises:
            ValueError: it is missing or has another shape.
        """
        tensor = self.get(key, shape)
        if tensor is None:
            raise ValueError(
                f"{self.origin} must have {key!r}, but lacks it. The file is incomplete or in another format."
            )
        return tensor

    def numbers(self, key: str, count: int) -> Tensor:
        """A required tensor of finite numbers, fp32 `[count]`; the file may have one for all.

        Raises:
            ValueError: it is missing, has another size, NaN or infinity.
        """
        tensor = self.take(key)
        if tensor.numel() not in (1, count):
            wanted = "one number" if count == 1 else f"one number or {count}"
            raise ValueError(f"{key!r} of {self.origin} must be {wanted}, got shape {tuple(tensor.shape)}.")
        numbers = tensor.float().flatten()
        if not bool(numbers.isfinite().all()):
            raise ValueError(f"{key!r} of {self.origin} must be finite, but has NaN or infinity. Download it again.")
        return numbers.expand(count)

    def number(self, key: str) -> float | None:
        """A tensor of one finite number, or None if there is none."""
        return self.numbers(key, 1).item() if key in self else None

    def check_all_read(self, ignored: Sequence[str]) -> None:
        """Checks that all tensors were read, except keys that end in one of `ignored`.

        Raises:
            ValueError: naming keys.
        """
        unread = sorted(key for key in self._unread if not key.endswith(tuple(ignored)))
        if unread:
            raise ValueError(
                f"{self.origin} has {len(unread)} tensors that the model does not have, such as {unread[:3]}. "
                "The checkpoint is for a different architecture or an unsupported variant."
            )


@dataclass
class UnpackedLayer:
    """A 4- or 8-bit layer in natural order.

    Attributes:
        codes: nibbles in uint8, `[N, K]`; for int8 in int8, for float8 bytes in uint8.
        scales: `[N, G]`, 16 bit, or e4m3 for NVFP4; for int8 and float8 fp32 `[N]`.
        row_scales: fp32 `[N]` for NVFP4, else None.
        smooth: `[K]`, divides the input of the 4-bit part.
        down, up: `[r, K]` and `[N, r]`, for the raw input.
        bias: `[N]` or None.
        weight_only: whether activations stay in 16 bit.
        input_scale: static scale of the input for runtimes that do not measure each, or None. Ours does.
        rotation: size of the groups of inputs that are rotated, or None; see `kernels/rotation.py`.
    """

    codes: Tensor
    scales: Tensor
    row_scales: Tensor | None
    smooth: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None
    weight_only: bool = False
    input_scale: float | None = None
    rotation: int | None = None

    @classmethod
    def of(cls, layer: SVDQuantLayer) -> "UnpackedLayer":
        """The content of one of our own layers."""
        parts = QuantizedWeight.from_tensors(
            {name: part.detach() for name, part in layer.named_parameters(recurse=False)}
        )
        return cls.of_weight(parts, layer.bias, layer.is_weight_only, layer.input_scale)

    @classmethod
    def of_weight(
        cls, weight: QuantizedWeight, bias: Tensor | None, weight_only: bool = False, input_scale: float | None = None
    ) -> "UnpackedLayer":
        """The content of a quantized weight; see the attributes."""
        precision, features = precision_of(weight.wscales, weight.qweight), weight.smooth_factor.shape[0]
        if precision not in GROUP_SIZES:
            scales = weight.wscales
        else:
            scales = bits(weight.wscales)[:, : -(-features // GROUP_SIZES[precision])].view(weight.wscales.dtype)
        return cls(
            unpack_codes(weight.qweight, precision)[:, :features],
            scales,
            None if weight.wtscale is None else weight.wtscale.float(),
            weight.smooth_factor,
            weight.proj_down,
            weight.proj_up,
            None if bias is None else bias.detach(),
            weight_only,
            input_scale,
            None if weight.rotation is None else rotation_size(weight.rotation),
        )

    @property
    def precision(self) -> str:
        """ "int4", "nvfp4", "int8" or "float8"."""
        return precision_of(self.scales, self.codes)

    @property
    def group_size(self) -> int:
        """K / G, in 4 bits."""
        return GROUP_SIZES[self.precision]

    @property
    def rank(self) -> int:
        """Of the low-rank branch."""
        return self.down.shape[0]

    @property
    def has_branch(self) -> bool:
        """Whether the low-rank branch adds anything."""
        return bool(self.down.any()) and bool(self.up.any())

    def rows(self, index: Tensor | slice) -> "UnpackedLayer":
        """A selection of output features."""
        return replace(
            self,
            codes=self.codes[index],
            scales=bits(self.scales)[index].view(self.scales.dtype),
            row_scales=None if self.row_scales is None else self.row_scales[index],
            up=self.up[index],
            bias=None if self.bias is None else self.bias[index],
        )

    def columns(self, first: int, last: int | None = None) -> "UnpackedLayer":
        """The first input features, or those from `first` (at the start of a group) to `last`."""
        first, last = (0, first) if last is None else (first, last)
        groups = slice(first // self.group_size, -(-last // self.group_size))
        return replace(
            self,
            codes=self.codes[:, first:last],
            scales=bits(self.scales)[:, groups].view(self.scales.dtype),
            smooth=self.smooth[first:last],
            down=self.down[:, first:last],
        )

    def with_rank(self, rank: int) -> "UnpackedLayer":
        """The same layer with zeros for the ranks that it does not have."""
        missing = rank - self.rank
        return replace(self, down=F.pad(self.down, (0, 0, 0, missing)), up=F.pad(self.up, (0, missing)))

    def with_rows(self, rows: int) -> "UnpackedLayer":
        """The same layer with further output features, which are zero."""
        more = rows - len(self.codes)
        return replace(
            self,
            codes=F.pad(self.codes, (0, 0, 0, more)),
            scales=F.pad(bits(self.scales), (0, 0, 0, more)).view(self.scales.dtype),
            row_scales=None
            if self.row_scales is None
            else torch.cat([self.row_scales, self.row_scales[:1].expand(more)]),
            up=F.pad(self.up, (0, 0, 0, more)),
            bias=None if self.bias is None else F.pad(self.bias, (0, more)),
        )

    def without_unused_ranks(self) -> "UnpackedLayer":
        """The same layer without ranks whose part of either projection is zero."""
        used = self.down.any(1) & self.up.any(0)
        return replace(self, down=self.down[used], up=self.up[:, used])

    def to_quantized_weight(self, dtype: torch.dtype) -> QuantizedWeight:
        """The layer in the layout of our own layers.

        Row scales and smoothing factors stay in fp32 if `dtype` would round them.
        """
        rotation = None if self.rotation is None else rotation_tensor(self.rotation, self.codes.device)
        if self.precision not in GROUP_SIZES:
            return QuantizedWeight(
                pad_features(self.codes),
                self.scales.float(),
                None,
                _exact_in(self.smooth, dtype),
                self.down.to(dtype),
                self.up.to(dtype),
                rotation,
            )
        groups = padded(self.codes.shape[1]) // self.group_size
        scales = self.scales if self.row_scales is not None else self.scales.to(dtype)
        return QuantizedWeight(
            pack_nibbles(pad_features(self.codes), self.group_size),
            F.pad(bits(scales), (0, groups - scales.shape[1])).view(scales.dtype),
            None if self.row_scales is None else _exact_in(self.row_scales, dtype),
            _exact_in(self.smooth, dtype),
            self.down.to(dtype),
            self.up.to(dtype),
            rotation,
        )

    def matrix(self) -> Tensor:
        """The weight that the layer represents, fp32 `[N, K]`."""
        item = self.to_quantized_weight(torch.float32)
        return dequantize_weight(**vars(item), dtype=torch.float32)


def one_factor(layer: UnpackedLayer, name: str, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """An NVFP4 layer as runtimes store it that have one factor for the whole weight, and no zero among the scales.

    Args:
        layer: with row factors.
        name: for the warning if scales have to be rounded, where row factors are no powers of two or far apart.
        factor: by default the largest of the rows.

    Returns:
        Codes `[N, K]`, without -0; e4m3 scales `[N, G]`; the factor, an fp32 scalar.
    """
    assert layer.row_scales is not None
    factor = (layer.row_scales.max() if factor is None else factor).float().reshape(())
    exact = layer.scales.float() * (layer.row_scales / factor)[:, None]
    scales = exact.to(torch.float8_e4m3fn)
    is_empty = scales.float() == 0
    if not torch.equal(scales.float()[~is_empty], exact[~is_empty]):
        error = ((scales.float() - exact).abs() / exact.abs().clamp(min=2.0**-9)).max().item()
        logger.warning(f"{name!r}: scales of groups were rounded by up to {error:.3f}, for one factor for all rows.")
    codes = layer.codes.masked_fill(is_empty.repeat_interleave(layer.group_size, 1)[:, : layer.codes.shape[1]], 0)
    return torch.where(codes == 8, 0, codes), bits(scales).masked_fill(is_empty, 1).view(scales.dtype), factor


def bits(scales: Tensor) -> Tensor:
    """e4m3 as bytes, which PyTorch can index, pad and concatenate on all devices."""
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales


def merge_columns(first: UnpackedLayer, second: UnpackedLayer, name: str) -> UnpackedLayer:
    """Merges two layers whose outputs are added into one layer on the concatenated inputs.

    Two NVFP4 layers have separate row scales, but the merged layer has one. Their ratio goes into the smoothing
    factors of the second layer, which divide its weight and its input alike; codes and scales are unchanged.
    Two branches with the same up projection become one of the same rank.

    Raises:
        ValueError: the first layer ends within a group, or the ratio of the row scales differs between rows.
    """
    features = first.codes.shape[1]
    if features % first.group_size or first.scales.dtype != second.scales.dtype:
        raise ValueError(
            f"{name!r} cannot be merged: its first part, {features} features, must be a multiple of the group size "
            f"{first.group_size} and have the format of the second, got {first.scales.dtype} and "
            f"{second.scales.dtype}."
        )
    smooth = second.smooth.float()
    if first.row_scales is not None and second.row_scales is not None:
        ratio = first.row_scales.double() / second.row_scales.double()
        if not (ratio == ratio[0]).all():
            raise ValueError(
                f"{name!r} cannot be merged: the row scales of its parts must have the same ratio in all rows, got "
                f"{ratio.min().item()} to {ratio.max().item()}."
            )
        smooth = (smooth.double() * ratio[0]).float()
    biases = [part.bias.float() for part in (first, second) if part.bias is not None]
    if torch.equal(first.up, second.up):
        down, up = torch.cat([first.down, second.down], dim=1), first.up
    else:
        down, up = torch.block_diag(first.down, second.down), torch.cat([first.up, second.up], dim=1)
    return replace(
        first,
        codes=torch.cat([first.codes, second.codes], dim=1),
        scales=torch.cat([bits(first.scales), bits(second.scales)], dim=1).view(first.scales.dtype),
        smooth=torch.cat([first.smooth.float(), smooth]),
        down=down,
        up=up,
        bias=torch.stack(biases).sum(0) if biases else None,
    )


def stack_rows(parts: Sequence[UnpackedLayer], name: str) -> UnpackedLayer:
    """Layers with the same input as one layer whose output is their outputs one after the other.

    Parts with equal down projections keep their rank; with different ones the ranks add up. No number changes.

    Raises:
        ValueError: the parts differ in format or smoothing factors.
    """
    first = parts[0]
    kinds = {(part.precision, part.rotation, part.scales.dtype, part.weight_only) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"{name!r} cannot be fused: its parts must have one format and one kind of activations.")
    if not all(torch.equal(part.smooth, first.smooth) for part in parts):
        raise ValueError(
            f"{name!r} cannot be fused: its parts must have the same smoothing factors, as layers have that were "
            "quantized together. Quantize the model again, or convert with `requantize`."
        )
    if all(torch.equal(part.down, first.down) for part in parts):
        down, up = first.down, torch.cat([part.up for part in parts])
    else:
        down, up = torch.cat([part.down for part in parts]), torch.block_diag(*(part.up for part in parts))
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat([part.up.new_zeros(len(part.up)) if part.bias is None else part.bias for part in parts])
    row_scales = [part.row_scales for part in parts if part.row_scales is not None]
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([bits(part.scales) for part in parts]).view(first.scales.dtype),
        row_scales=torch.cat(row_scales) if row_scales else None,
        down=down,
        up=up,
        bias=bias,
    )


def _exact_in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    return rounded if torch.equal(rounded.to(torch.float32), tensor.to(torch.float32)) else tensor.float()
