"""One layer of a Nunchaku file in natural order, and its transformations: select, merge, remove the shift.

Legend: N output features, K input features, G groups along K, r rank. Nunchaku pads N and K to multiples of 128.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_sana.kernels.low_bit import (
    GROUP_SIZES,
    decode_int4,
    nonzero,
    pack_nibbles,
    pad_features,
    padded,
    precision_of,
)
from diffusers_sana.loaders.nunchaku import packing
from diffusers_sana.quantizers.svdquant.algorithm.decompose import QuantizedWeight


SHIFT = 0.171875  # added to the output of GELU, so that 4-bit codes need no sign
LITE_NAMES = {"smooth": "smooth_factor", "lora_down": "proj_down", "lora_up": "proj_up"}


class Source:
    """The tensors of a checkpoint; records which were read.

    Args:
        tensors: by key.
        origin: name of the checkpoint, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        self.tensors, self.origin = tensors, origin
        self._unread = set(tensors)

    def get(self, key: str, shape: tuple[int, ...] | None = None) -> Tensor | None:
        """A tensor, or None if there is none.

        Raises:
            ValueError: another shape.
        """
        tensor = self.tensors.get(key)
        self._unread.discard(key)
        if tensor is not None and shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{key!r} must have shape {tuple(shape)}, got {tuple(tensor.shape)} in {self.origin}. "
                "The checkpoint is for a different architecture, or not in Nunchaku's layout."
            )
        return tensor

    def take(self, key: str, shape: tuple[int, ...] | None = None) -> Tensor:
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

    def check_all_read(self, ignored: str) -> None:
        """Checks that all tensors were read, except keys that end in `ignored`.

        Raises:
            ValueError: naming keys.
        """
        unread = sorted(key for key in self._unread if not key.endswith(ignored))
        if unread:
            raise ValueError(
                f"{self.origin} has {len(unread)} tensors that the model does not have, such as {unread[:3]}. "
                "The checkpoint is for a different architecture or an unsupported variant."
            )


@dataclass
class UnpackedLayer:
    """A 4-bit layer in natural order.

    Attributes:
        codes: nibbles in uint8, `[N, K]`.
        scales: `[N, G]`, 16 bit, or e4m3 for NVFP4.
        row_scales: fp32 `[N]` for NVFP4, else None.
        smooth: `[K]`.
        down, up: `[r, K]` and `[N, r]`.
        bias: `[N]` or None.
    """

    codes: Tensor
    scales: Tensor
    row_scales: Tensor | None
    smooth: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None

    def rows(self, index: Tensor | slice) -> "UnpackedLayer":
        """A selection of output features."""
        return replace(
            self,
            codes=self.codes[index],
            scales=_bits(self.scales)[index].view(self.scales.dtype),
            row_scales=None if self.row_scales is None else self.row_scales[index],
            up=self.up[index],
            bias=None if self.bias is None else self.bias[index],
        )

    def columns(self, features: int) -> "UnpackedLayer":
        """The first input features."""
        groups = -(-features // GROUP_SIZES[precision_of(self.scales)])
        return replace(
            self,
            codes=self.codes[:, :features],
            scales=self.scales[:, :groups],
            smooth=self.smooth[:features],
            down=self.down[:, :features],
        )

    def to_quantized_weight(self, dtype: torch.dtype) -> QuantizedWeight:
        """The layer in the layout of our own layers.

        Row scales and smoothing factors stay in fp32 if `dtype` would round them.
        """
        group_size = GROUP_SIZES[precision_of(self.scales)]
        groups = padded(self.codes.shape[1]) // group_size
        scales = self.scales if self.row_scales is not None else self.scales.to(dtype)
        return QuantizedWeight(
            pack_nibbles(pad_features(self.codes), group_size),
            F.pad(_bits(scales), (0, groups - scales.shape[1])).view(scales.dtype),
            None if self.row_scales is None else _exact_in(self.row_scales, dtype),
            _exact_in(self.smooth, dtype),
            self.down.to(dtype),
            self.up.to(dtype),
        )


def read_svdq(
    source: Source, prefix: str, rows: int, columns: int, names: Mapping[str, str] | None = None
) -> UnpackedLayer:
    """A layer with 4-bit weights and activations, without the padding.

    The low-rank branch, and NVFP4's scales other than those of groups, are optional, as in Nunchaku.

    Args:
        source: the checkpoint.
        prefix: name of the layer in it.
        rows, columns: N and K.
        names: keys that differ from those of Nunchaku's files, such as `LITE_NAMES`.

    Raises:
        ValueError: a tensor is missing, has another shape, or has weights in the padding; it is named.
    """

    def key(name: str) -> str:
        return f"{prefix}.{(names or {}).get(name, name)}"

    high, wide = -(-rows // packing.TILE) * packing.TILE, -(-columns // packing.TILE) * packing.TILE
    codes = packing.unpack_codes(source.take(key("qweight"), (high, wide // 2)))
    scales = source.take(key("wscales"))
    precision = precision_of(scales)
    source.take(key("wscales"), (wide // GROUP_SIZES[precision], high))
    smooth = packing.unpack_vector(source.take(key("smooth"), (wide,)))
    down, up = source.get(key("lora_down")), source.get(key("lora_up"))
    if down is None and up is None:
        branch = smooth.new_zeros(0, wide), smooth.new_zeros(high, 0)
    else:
        rank = source.take(key("lora_down")).shape[-1]
        branch = (
            packing.unpack_down(source.take(key("lora_down"), (wide, rank))),
            packing.unpack_up(source.take(key("lora_up"), (high, rank))),
        )
    bias = source.get(key("bias"), (high,))
    layer = UnpackedLayer(
        codes,
        packing.unpack_scales(scales) if precision == "int4" else packing.unpack_micro_scales(scales),
        _row_scales(source, key, high) if precision == "nvfp4" else None,
        smooth,
        *branch,
        None if bias is None else packing.unpack_vector(bias),
    )
    _check_padding(layer, rows, columns, key("qweight"), source.origin)
    return layer.rows(slice(rows)).columns(columns)


def read_awq(source: Source, prefix: str, rows: int, columns: int) -> UnpackedLayer:
    """A layer with 4-bit weights `codes * scales + zeros` and 16-bit activations.

    Zeros that are integer multiples of the scales are folded into the codes. Any others become a low-rank branch of
    rank K/64 that adds a constant to each group. A LoRA that the file has for the layer joins the branch.

    Raises:
        ValueError: a tensor is missing or has another shape; it is named.
    """
    groups = columns // packing.AWQ_GROUP
    codes = packing.unpack_awq(source.take(f"{prefix}.qweight", (rows // 4, columns // 2)))
    scales, zeros = (source.take(f"{prefix}.{name}") for name in ("wscales", "wzeros"))
    for name, tensor in (("wscales", scales), ("wzeros", zeros)):
        if tensor.dim() != 2 or tensor.shape[0] < groups or tensor.shape[1] != rows:
            source.take(f"{prefix}.{name}", (groups, rows))
    scales, zeros = scales[:groups].t(), zeros[:groups].t()
    # The codes of a group whose scale is 0 are arbitrary; with a zero point of 8 all of them are in range.
    point = torch.where(scales == 0, 8.0, -zeros.float() / nonzero(scales.float())).round()
    signed = codes.unflatten(1, (-1, packing.AWQ_GROUP)).to(torch.int16) - point[..., None].to(torch.int16)
    down, up = scales.new_zeros(0, columns), scales.new_zeros(rows, 0)
    is_multiple = torch.equal((-point * scales.float()).to(zeros.dtype), zeros)
    if not is_multiple or signed.amin() < -8 or signed.amax() > 7:
        signed = codes.unflatten(1, (-1, packing.AWQ_GROUP)).to(torch.int16) - 8
        up = zeros.float() + 8 * scales.float()
        down = torch.eye(groups).repeat_interleave(packing.AWQ_GROUP, dim=1)
    nibbles = signed.flatten(1).to(torch.int8).bitwise_and(15).view(torch.uint8)
    of_lora = [f"{prefix}.lora_{end}" for end in ("down", "up")]
    if any(source.get(key) is not None for key in of_lora):
        rank = len(source.take(of_lora[0]))
        down = torch.cat([down.float(), source.take(of_lora[0], (rank, columns)).float()])
        up = torch.cat([up.float(), source.take(of_lora[1], (rows, rank)).float()], dim=1)
    bias = source.get(f"{prefix}.bias", (rows,))
    return UnpackedLayer(nibbles, scales, None, scales.new_ones(columns), down, up, bias)


def merge_columns(first: UnpackedLayer, second: UnpackedLayer, name: str) -> UnpackedLayer:
    """Merges two layers whose outputs are added into one layer on the concatenated inputs.

    Two NVFP4 layers have separate row scales, but the merged layer has one. Their ratio goes into the smoothing
    factors of the second layer, which divide its weight and its input alike; codes and scales are unchanged.

    Raises:
        ValueError: the first layer ends within a group, or the ratio of the row scales differs between rows.
    """
    features, group_size = first.codes.shape[1], GROUP_SIZES[precision_of(first.scales)]
    if features % group_size or first.scales.dtype != second.scales.dtype:
        raise ValueError(
            f"{name!r} cannot be merged: its first part, {features} features, must be a multiple of the group size "
            f"{group_size} and have the format of the second, got {first.scales.dtype} and {second.scales.dtype}."
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
    return UnpackedLayer(
        torch.cat([first.codes, second.codes], dim=1),
        torch.cat([_bits(first.scales), _bits(second.scales)], dim=1).view(first.scales.dtype),
        first.row_scales,
        torch.cat([first.smooth.float(), smooth]),
        torch.block_diag(first.down, second.down),
        torch.cat([first.up, second.up], dim=1),
        torch.stack(biases).sum(0) if biases else None,
    )


def without_shift(layer: UnpackedLayer) -> UnpackedLayer:
    """Corrects the bias of an int4 layer after GELU for an input that is not shifted; NVFP4 is never shifted."""
    if layer.row_scales is not None or layer.bias is None:
        return layer
    codes, inverse = pad_features(decode_int4(layer.codes)), pad_features(1 / layer.smooth.float())
    group_size = GROUP_SIZES["int4"]
    sums = torch.einsum("ngk,gk->ng", codes.float().unflatten(1, (-1, group_size)), inverse.view(-1, group_size))
    return replace(layer, bias=layer.bias.float() + SHIFT * (sums * layer.scales.float()).sum(1))


def _bits(scales: Tensor) -> Tensor:
    """e4m3 as bytes, which PyTorch can index, pad and concatenate on all devices."""
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales


def _check_padding(layer: UnpackedLayer, rows: int, columns: int, name: str, origin: str) -> None:
    """Checks that the padding is empty: a model of another width can have the same padded width."""
    group_size = GROUP_SIZES[precision_of(layer.scales)]
    has_sign = layer.row_scales is not None  # of a zero, too
    used = (layer.codes & (7 if has_sign else 15)) != 0
    used &= layer.scales.float().repeat_interleave(group_size, dim=1)[:, : used.shape[1]] != 0
    if used[rows:].any() or used[:, columns:].any():
        raise ValueError(
            f"{name!r} must have the shape ({rows}, {columns}) before padding, got weights beyond that in {origin}. "
            "The checkpoint is for a model of another width."
        )


def _row_scales(source: Source, key: Callable[[str], str], rows: int) -> Tensor:
    """Product of the per-tensor scale and the per-row scales; missing scales are 1."""
    of_rows, of_tensor = source.get(key("wcscales"), (rows,)), source.get(key("wtscale"))
    scales = torch.ones(rows) if of_rows is None else packing.unpack_vector(of_rows).float()
    return scales if of_tensor is None else scales * of_tensor.float().reshape(1)


def _exact_in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    return rounded if torch.equal(rounded.to(torch.float32), tensor.to(torch.float32)) else tensor.float()
