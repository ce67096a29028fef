"""Tensor names and fused layers of FLUX.1 in Nunchaku's files."""

from collections.abc import Mapping

import torch

from diffusers_sana.loaders.nunchaku.layers import read_adaln, read_svdq, without_shift
from diffusers_sana.loaders.quantized.assemble import Conversion, block_names, matrix_shape
from diffusers_sana.loaders.quantized.layer import Source, merge_columns


# Name in the file -> layers of the model whose rows it concatenates.
DOUBLE = {
    "qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv_proj_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "out_proj": ("attn.to_out.0",),
    "out_proj_context": ("attn.to_add_out",),
    "mlp_fc1": ("ff.net.0.proj",),
    "mlp_fc2": ("ff.net.2",),
    "mlp_context_fc1": ("ff_context.net.0.proj",),
    "mlp_context_fc2": ("ff_context.net.2",),
}
SINGLE = {"qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"), "mlp_fc1": ("proj_mlp",)}
SHIFTED = ("mlp_fc2", "mlp_context_fc2")  # their input is the output of GELU plus a constant
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
# All of this as names of a whole model, for writing.
SCHEME = {
    f"{blocks}.*.{key}": tuple(f"{blocks}.*.{name}" for name in names)
    for blocks, fused in (("transformer_blocks", DOUBLE), ("single_transformer_blocks", SINGLE))
    for key, names in (fused | {norm: (f"attn.{norm}",) for norm in NORMS}).items()
}


def convert_flux(source: Source, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Conversion:
    """Converts the blocks of a FLUX file; see `load.Converter`."""
    out = Conversion(dtype)
    for block in block_names(shapes, "transformer_blocks"):
        _split(source, shapes, block, DOUBLE, out)
        for name in ("norm1.linear", "norm1_context.linear"):
            out.add(
                f"{block}.{name}", read_adaln(source, f"{block}.{name}", *matrix_shape(shapes, f"{block}.{name}"), 6)
            )
    for block in block_names(shapes, "single_transformer_blocks"):
        _split(source, shapes, block, SINGLE, out)
        name = f"{block}.norm.linear"
        out.add(name, read_adaln(source, name, *matrix_shape(shapes, name), 3))
        name = f"{block}.proj_out"
        rows, columns = matrix_shape(shapes, name)
        attention = matrix_shape(shapes, f"{block}.attn.to_q")[0]
        first = read_svdq(source, f"{block}.out_proj", rows, attention)
        second = read_svdq(source, f"{block}.mlp_fc2", rows, columns - attention)
        out.add(name, merge_columns(first, without_shift(second), name))
    for key in shapes:
        block, _, name = key.partition(".attn.")
        if name.removesuffix(".weight") in NORMS:
            out.unquantized[key] = source.take(f"{block}.{name}", shapes[key])
    return out


def _split(
    source: Source, shapes: Mapping[str, torch.Size], block: str, fused: Mapping[str, tuple[str, ...]], out: Conversion
) -> None:
    for key, names in fused.items():
        sizes = [matrix_shape(shapes, f"{block}.{name}") for name in names]
        layer = read_svdq(source, f"{block}.{key}", sum(rows for rows, _ in sizes), sizes[0][1])
        layer = without_shift(layer) if key in SHIFTED else layer
        start = 0
        for name, (rows, _) in zip(names, sizes, strict=True):
            out.add(f"{block}.{name}", layer.rows(slice(start, start + rows)))
            start += rows
