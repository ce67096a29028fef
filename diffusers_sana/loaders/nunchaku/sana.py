"""Tensor names, fused layers and interleaving of Sana in Nunchaku's files: read and written."""

from collections.abc import Iterator, Mapping

import torch
from diffusers.utils import logging
from torch import Tensor

from diffusers_sana.loaders.nunchaku.layers import read_svdq
from diffusers_sana.loaders.nunchaku.packing import TILE
from diffusers_sana.loaders.quantized.assemble import Conversion, block_names, matrix_shape
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer, stack_rows
from diffusers_sana.loaders.quantized.model import QuantizedModel


logger = logging.get_logger(__name__)

HEAD_DIM = 32  # the only one that Nunchaku's linear attention has
PLAIN = {
    "attn.out_proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.out_proj": "attn2.to_out.0",
    "ff.point_conv": "ff.conv_point",
}
SCHEME = {"*.attn.qkv_proj": ("*.attn1.to_q", "*.attn1.to_k", "*.attn1.to_v")}  # layers that must fit together
WITHOUT_BIAS = "attn.out_proj"  # files may lack this bias, because Nunchaku's Sana does not use it; Sana has one


def convert_sana(source: Source, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Conversion:
    """Converts the blocks of a Sana file; see `load.Converter`."""
    out = Conversion(dtype)
    for block in block_names(shapes, "transformer_blocks"):
        for key, name in PLAIN.items():
            layer = read_svdq(source, f"{block}.{key}", *matrix_shape(shapes, f"{block}.{name}"))
            if layer.bias is None and key == WITHOUT_BIAS:
                logger.warning(
                    f"{source.origin} has no bias for {block}.{key}, which Nunchaku never adds; it is set to zero."
                )
                layer.bias = layer.up.new_zeros(layer.up.shape[0])
            out.add(f"{block}.{name}", layer)
        _self_attention(source, shapes, block, out)
        _text_projections(source, shapes, block, out)
        _gated_convolution(source, shapes, block, out)
    return out


def _self_attention(source: Source, shapes: Mapping[str, torch.Size], block: str, out: Conversion) -> None:
    """In the file: all queries, then keys and values interleaved by head; each of the three is padded."""
    rows, columns = matrix_shape(shapes, f"{block}.attn1.to_q")
    high = -(-rows // TILE) * TILE
    layer = read_svdq(source, f"{block}.attn.qkv_proj", 3 * high, columns)
    keys, values = (high + torch.arange(2 * high).reshape(-1, 2, HEAD_DIM)).unbind(1)
    for name, index in (("to_q", torch.arange(high)), ("to_k", keys.flatten()), ("to_v", values.flatten())):
        out.add(f"{block}.attn1.{name}", layer.rows(index[:rows]))


def _text_projections(source: Source, shapes: Mapping[str, torch.Size], block: str, out: Conversion) -> None:
    for part in ("weight", "bias"):
        key, value = f"{block}.attn2.to_k.{part}", f"{block}.attn2.to_v.{part}"
        shape = (2 * shapes[key][0], *shapes[key][1:])
        out.unquantized[key], out.unquantized[value] = source.take(
            f"{block}.cross_attn.kv_linear.{part}", shape
        ).chunk(2)


def _gated_convolution(source: Source, shapes: Mapping[str, torch.Size], block: str, out: Conversion) -> None:
    """In the file, channel i of the values is at 2 i, channel i of the gates at 2 i + 1; they are padded together."""
    rows, columns = matrix_shape(shapes, f"{block}.ff.conv_inverted")
    high = -(-rows // TILE) * TILE
    interleaved = torch.arange(high).reshape(-1, 2)[: rows // 2].t().flatten()
    layer = read_svdq(source, f"{block}.ff.inverted_conv", high, columns)
    out.add(f"{block}.ff.conv_inverted", layer.rows(interleaved))

    def depthwise(part: str, *shape: int) -> Tensor:
        return source.take(f"{block}.ff.depth_conv.{part}", (high, *shape))[interleaved]

    out.unquantized[f"{block}.ff.conv_depth.weight"] = depthwise("weight", 3, 3, 1).permute(0, 3, 1, 2)
    out.unquantized[f"{block}.ff.conv_depth.bias"] = depthwise("bias")


def sana_content(model: QuantizedModel) -> Iterator[tuple[str, UnpackedLayer | dict[str, Tensor]]]:
    """All content of a model under the names of a file, in its order of rows: the inverse of `convert_sana`.

    Raises:
        ValueError: heads of another size, or query-key norms, neither of which Nunchaku's Sana has.
    """
    if model.config.get("qk_norm") or model.config.get("attention_head_dim") != HEAD_DIM:
        raise ValueError(
            f"Nunchaku's Sana has heads of {HEAD_DIM} and no `qk_norm`, got {model.config.get('attention_head_dim')} "
            f"and {model.config.get('qk_norm')!r}."
        )
    done = set()
    modules = model.modules
    for block in block_names((f"{name}." for name in modules), "transformer_blocks"):
        for key, name in PLAIN.items():
            yield f"{block}.{key}", model.layer(f"{block}.{name}")
        names = [f"{block}.attn1.to_{x}" for x in "qkv"]
        parts = [model.layer(name) for name in names]
        high = -(-len(parts[0].codes) // TILE) * TILE
        keys = torch.arange(high, 2 * high).reshape(-1, 1, HEAD_DIM)
        mixed = torch.cat([keys, keys + high], 1).flatten()
        qkv = stack_rows([part.with_rows(high) for part in parts], f"{block}.attn.qkv_proj")
        yield f"{block}.attn.qkv_proj", qkv.rows(torch.cat([torch.arange(high), mixed]))
        text = [_dense(model, modules, f"{block}.attn2.to_{x}") for x in "kv"]
        yield f"{block}.cross_attn.kv_linear", {leaf: torch.cat([part[leaf] for part in text]) for leaf in text[0]}
        inverted = model.layer(f"{block}.ff.conv_inverted")
        rows = len(inverted.codes)
        high = -(-rows // TILE) * TILE
        by_turns = torch.arange(rows).reshape(2, -1).t().flatten()
        yield f"{block}.ff.inverted_conv", inverted.rows(by_turns)
        depth = modules[f"{block}.ff.conv_depth"]
        weight = torch.zeros(high, 3, 3, 1, dtype=model.dtype)
        weight[:rows] = depth["weight"][by_turns].permute(0, 2, 3, 1)
        bias = torch.zeros(high, dtype=model.dtype)
        bias[:rows] = depth["bias"][by_turns]
        yield f"{block}.ff.depth_conv", {"weight": weight, "bias": bias}
        done |= {*names, f"{block}.attn2.to_k", f"{block}.attn2.to_v"}
        done |= {
            f"{block}.ff.conv_inverted",
            f"{block}.ff.conv_depth",
            *(f"{block}.{name}" for name in PLAIN.values()),
        }
    for name in modules:
        if name not in done:
            yield name, _dense(model, modules, name)


def _dense(model: QuantizedModel, modules: Mapping[str, dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    return model.dense(name) if name in model.layers else modules[name]
