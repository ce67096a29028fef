"""One layer of a Nunchaku file: tensors in the order of matrix fragments from and to `UnpackedLayer`.

Legend: N output features, K input features, G groups along K, r rank. Nunchaku pads N and K to multiples of 128.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import (
    GROUP_SIZES,
    decode_int4,
    encode_weight,
    nonzero,
    pad_features,
    precision_of,
    unpack_nibbles,
    weight_scales,
)
from diffusers_sana.loaders.nunchaku import mxfp4, packing
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer


SHIFT = 0.171875  # added to the output of GELU, so that 4-bit codes need no sign
LITE_NAMES = {"smooth": "smooth_factor", "lora_down": "proj_down", "lora_up": "proj_up"}


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
    is_mxfp4 = scales.dtype == torch.uint8
    precision = "nvfp4" if is_mxfp4 else precision_of(scales)
    source.take(key("wscales"), (wide // (mxfp4.GROUP if is_mxfp4 else GROUP_SIZES[precision]), high))
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
    row_scales = None
    if is_mxfp4:
        scales, row_scales = mxfp4.read_scales(scales, columns, key("wscales"))
    elif precision == "nvfp4":
        scales, row_scales = packing.unpack_micro_scales(scales), _row_scales(source, key, high)
    else:
        scales = packing.unpack_scales(scales)
    layer = UnpackedLayer(
        codes,
        scales,
        row_scales,
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
    return UnpackedLayer(nibbles, scales, None, scales.new_ones(columns), down, up, bias, weight_only=True)


def read_adaln(source: Source, name: str, rows: int, columns: int, splits: int) -> UnpackedLayer:
    """A weight-only layer whose outputs are `splits` shifts, scales and gates of all channels.

    In the file, row `split * channels + channel` is at `channel * splits + split`; biases of scales have 1 added.
    """
    channels = rows // splits
    layer = read_awq(source, name, rows, columns).rows(torch.arange(rows).reshape(channels, splits).t().flatten())
    return layer if layer.bias is None else replace(layer, bias=_without_one(layer.bias, splits, 1))


def adaln_tensors(layer: UnpackedLayer, dtype: torch.dtype, splits: int) -> dict[str, Tensor]:
    """The inverse of `read_adaln`; a layer that is not plain is rounded to one."""
    rows = len(layer.codes)
    if layer.bias is not None:
        layer = replace(layer, bias=_without_one(layer.bias, splits, -1))
    layer = layer if is_plain(layer) else rounded_to_awq(layer, dtype)
    return awq_tensors(layer.rows(torch.arange(rows).reshape(splits, -1).t().flatten()), dtype)


def _without_one(bias: Tensor, splits: int, sign: int) -> Tensor:
    bias = bias.float().unflatten(0, (splits, -1)).clone()
    bias[[*{1, splits - 2}]] -= sign
    return bias.flatten()


def svdq_tensors(layer: UnpackedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer with 4-bit weights and activations, under the names `LITE_NAMES`, padded to the tiles.

    Zeros pad what is multiplied or added. Ones pad what the kernels divide by, and all scales.

    Args:
        layer: of a rank that is a multiple of 16, or of any rank, which is padded with zeros.
        dtype: of the file.
    """
    tensors = {
        "qweight": packing.pack_codes(layer.codes),
        "smooth_factor": packing.pack_vector(layer.smooth.to(dtype), padding=1),
        "proj_down": packing.pack_down(layer.down.to(dtype)),
        "proj_up": packing.pack_up(layer.up.to(dtype)),
    }
    if layer.bias is not None:
        tensors["bias"] = packing.pack_vector(layer.bias.to(dtype))
    if layer.row_scales is None:
        return tensors | {"wscales": packing.pack_scales(layer.scales.to(dtype))}
    return tensors | {
        "wscales": packing.pack_micro_scales(layer.scales),
        "wcscales": packing.pack_vector(layer.row_scales.to(dtype), padding=1),
    }


def fits_awq(layer: UnpackedLayer) -> bool:
    """Whether the sides are multiples of AWQ's tiles."""
    return layer.codes.shape[1] % packing.AWQ_GROUP == layer.codes.shape[0] % 4 == 0


def is_plain(layer: UnpackedLayer) -> bool:
    """Whether codes and scales alone define the layer, as `codes * scales + zeros`."""
    return layer.precision == "int4" and not layer.has_branch and bool((layer.smooth == 1).all())


def rounded_to_awq(layer: UnpackedLayer, dtype: torch.dtype) -> UnpackedLayer:
    """A layer of codes and scales alone, with a relative error of about .1."""
    return awq_layer(layer.matrix(), layer.bias, dtype)


def awq_layer(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> UnpackedLayer:
    """A 16-bit layer with its weight rounded to 4 bits."""
    scales, _ = weight_scales(weight.float(), "int4", dtype)
    codes = unpack_nibbles(encode_weight(weight.float(), scales, None), packing.AWQ_GROUP)
    rows, columns = weight.shape
    branch = weight.new_zeros(0, columns), weight.new_zeros(rows, 0)
    return UnpackedLayer(codes, scales, None, torch.ones(columns), *branch, bias, weight_only=True)


def awq_tensors(layer: UnpackedLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer with 4-bit weights and 16-bit activations; `bias` is in natural order.

    The zero point is 8, the only one for which no scale is rounded. A layer that is not plain is rounded to one.
    """
    layer = layer if is_plain(layer) else rounded_to_awq(layer, dtype)
    scales = layer.scales.to(dtype).t().contiguous()
    tensors = {"qweight": packing.pack_awq(layer.codes ^ 8), "wscales": scales, "wzeros": -8 * scales}
    return tensors if layer.bias is None else tensors | {"bias": layer.bias.to(dtype)}


def without_shift(layer: UnpackedLayer, sign: int = 1) -> UnpackedLayer:
    """Corrects the bias of an int4 layer after GELU for an input that is not shifted; NVFP4 is never shifted.

    With `sign=-1` the inverse: the bias for a runtime that adds the shift to the input of the 4-bit part.
    """
    if layer.row_scales is not None or layer.bias is None:
        return layer
    codes, inverse = pad_features(decode_int4(layer.codes)), pad_features(1 / layer.smooth.float())
    group_size = GROUP_SIZES["int4"]
    sums = torch.einsum("ngk,gk->ng", codes.float().unflatten(1, (-1, group_size)), inverse.view(-1, group_size))
    return replace(layer, bias=layer.bias.float() + sign * SHIFT * (sums * layer.scales.float()).sum(1))


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
