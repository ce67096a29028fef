"""One layer of a Nunchaku file in natural order, and what importers do to it: select, merge, take the shift out.

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
    """The tensors of a checkpoint; knows which were read.

    Args:
        tensors: by key.
        origin: where they come from, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        self.tensors, self.origin = tensors, origin
        self._unread = set(tensors)

    def get(self, key: str, shape: tuple[int, ...] | None = None) -> Tensor | None:
        """A tensor, or None where there is none.

        Raises:
            ValueError: another shape.
        """
        tensor = self.tensors.get(key)
        self._unread.discard(key)
        if tensor is not None and shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{key!r} must have shape {tuple(shape)}, got {tuple(tensor.shape)} in {self.origin}. "
                "The file is of another model, or not in Nunchaku's layout."
            )
        return tensor

    def take(self, key: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor that must be there.

        Raises:
            ValueError: another shape, or none.
        """
        tensor = self.get(key, shape)
        if tensor is None:
            raise ValueError(
                f"{self.origin} must have {key!r}, but has not. The file is not whole, or another format."
            )
        return tensor

    def check_all_read(self, ignored: str) -> None:
        """That nothing was left over but keys that end in `ignored`.

        Raises:
            ValueError: naming keys.
        """
        left = sorted(key for key in self._unread if not key.endswith(ignored))
        if left:
            raise ValueError(
                f"{self.origin} has {len(left)} tensors that the model has no place for, among them {left[:3]}. "
                "It is of another model, or of a variant that is not supported."
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
        """Some output features."""
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

    def native(self, dtype: torch.dtype) -> QuantizedWeight:
        """The layer as our own layers hold it.

        The row scales and smoothing factors that `dtype` would round stay fp32.
        """
        group_size = GROUP_SIZES[precision_of(self.scales)]
        groups = padded(self.codes.shape[1]) // group_size
        scales = self.scales if self.row_scales is not None else self.scales.to(dtype)
        return QuantizedWeight(
            pack_nibbles(pad_features(self.codes), group_size),
            F.pad(_bits(scales), (0, groups - scales.shape[1])).view(scales.dtype),
            None if self.row_scales is None else _unless_rounded(self.row_scales, dtype),
            _unless_rounded(self.smooth, dtype),
            self.down.to(dtype),
            self.up.to(dtype),
        )


def read_svdq(
    source: Source, prefix: str, rows: int, columns: int, names: Mapping[str, str] | None = None
) -> UnpackedLayer:
    """A layer with 4-bit weights and activations, without the padding.

    A file may leave out the low-rank branch, and the scales that NVFP4 has beside those of groups, as in Nunchaku.

    Args:
        source: where it is.
        prefix: its name there.
        rows, columns: N and K.
        names: keys that are not those of Nunchaku's files, such as `LITE_NAMES`.

    Raises:
        ValueError: a missing tensor, one of another shape, or one with weights in the padding, naming it.
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

    Zeros that are whole multiples of the scales go into the codes. Any others become a low-rank branch that adds a
    constant to each group, of rank K/64.

    Raises:
        ValueError: a missing tensor or one of another shape, naming it.
    """
    groups = columns // packing.AWQ_GROUP
    codes = packing.unpack_awq(source.take(f"{prefix}.qweight", (rows // 4, columns // 2)))
    scales, zeros = (source.take(f"{prefix}.{name}") for name in ("wscales", "wzeros"))
    for name, tensor in (("wscales", scales), ("wzeros", zeros)):
        if tensor.dim() != 2 or tensor.shape[0] < groups or tensor.shape[1] != rows:
            source.take(f"{prefix}.{name}", (groups, rows))
    scales, zeros = scales[:groups].t(), zeros[:groups].t()
    # The codes of a group whose scale is 0 mean nothing; with 8 for their zero point all of them are in range.
    point = torch.where(scales == 0, 8.0, -zeros.float() / nonzero(scales.float())).round()
    signed = codes.unflatten(1, (-1, packing.AWQ_GROUP)).to(torch.int16) - point[..., None].to(torch.int16)
    down, up = scales.new_zeros(0, columns), scales.new_zeros(rows, 0)
    is_whole = torch.equal((-point * scales.float()).to(zeros.dtype), zeros)
    if not is_whole or signed.amin() < -8 or signed.amax() > 7:
        signed = codes.unflatten(1, (-1, packing.AWQ_GROUP)).to(torch.int16) - 8
        up = zeros.float() + 8 * scales.float()
        down = torch.eye(groups).repeat_interleave(packing.AWQ_GROUP, dim=1)
    nibbles = signed.flatten(1).to(torch.int8).bitwise_and(15).view(torch.uint8)
    bias = source.get(f"{prefix}.bias", (rows,))
    return UnpackedLayer(nibbles, scales, None, scales.new_ones(columns), down, up, bias)


def merge_columns(first: UnpackedLayer, second: UnpackedLayer, name: str) -> UnpackedLayer:
    """Two layers whose outputs are added, as one layer of both inputs one after the other.

    Two NVFP4 layers have a row scale each, and the merged layer has room for one. The ratio goes into the smoothing
    factors of the second, which divide its weight and its input alike; no code and no scale changes.

    Raises:
        ValueError: a first layer that ends inside a group, or row scales whose ratio differs from row to row.
    """
    features, group_size = first.codes.shape[1], GROUP_SIZES[precision_of(first.scales)]
    if features % group_size or first.scales.dtype != second.scales.dtype:
        raise ValueError(
            f"{name!r} cannot be put together: its first part must be {features} features in whole groups of "
            f"{group_size} in the format of the second, got {first.scales.dtype} and {second.scales.dtype}."
        )
    smooth = second.smooth.float()
    if first.row_scales is not None and second.row_scales is not None:
        ratio = first.row_scales.double() / second.row_scales.double()
        if not (ratio == ratio[0]).all():
            raise ValueError(
                f"{name!r} cannot be put together: the row scales of its parts must have one ratio in all rows, got "
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
    """The bias of an int4 layer behind GELU made good for an input that is not shifted; NVFP4 is never shifted."""
    if layer.row_scales is not None or layer.bias is None:
        return layer
    codes, inverse = pad_features(decode_int4(layer.codes)), pad_features(1 / layer.smooth.float())
    group_size = GROUP_SIZES["int4"]
    sums = torch.einsum("ngk,gk->ng", codes.float().unflatten(1, (-1, group_size)), inverse.view(-1, group_size))
    return replace(layer, bias=layer.bias.float() + SHIFT * (sums * layer.scales.float()).sum(1))


def _bits(scales: Tensor) -> Tensor:
    """e4m3 as bytes, which PyTorch can index, pad and join everywhere."""
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales


def _check_padding(layer: UnpackedLayer, rows: int, columns: int, name: str, origin: str) -> None:
    """That nothing is lost with the padding: a model of another width can have the same padded one."""
    group_size = GROUP_SIZES[precision_of(layer.scales)]
    has_sign = layer.row_scales is not None  # of a zero, too
    used = (layer.codes & (7 if has_sign else 15)) != 0
    used &= layer.scales.float().repeat_interleave(group_size, dim=1)[:, : used.shape[1]] != 0
    if used[rows:].any() or used[:, columns:].any():
        raise ValueError(
            f"{name!r} must have the shape ({rows}, {columns}) before padding, got weights beyond that in {origin}. "
            "The file is of a model of another width."
        )


def _row_scales(source: Source, key: Callable[[str], str], rows: int) -> Tensor:
    """Product of the scale of the tensor and those of its rows; what a file leaves out is 1."""
    of_rows, of_tensor = source.get(key("wcscales"), (rows,)), source.get(key("wtscale"))
    scales = torch.ones(rows) if of_rows is None else packing.unpack_vector(of_rows).float()
    return scales if of_tensor is None else scales * of_tensor.float().reshape(1)


def _unless_rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    return rounded if torch.equal(rounded.to(torch.float32), tensor.to(torch.float32)) else tensor.float()
