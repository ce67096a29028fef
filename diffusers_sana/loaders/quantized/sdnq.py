"""SDNQ's `use_svd` layers, read.

Per layer `weight` uint8, flat, two neighbours a byte, codes + 8; `scale` `[N, G, 1]`; `svd_up` `[N, r]` and `svd_down`
`[r, K]`, both transposed if `use_quantized_matmul`. Written from a description of its files; none of its code is used.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffusers_sana.kernels.low_bit import GROUP_SIZES
from diffusers_sana.loaders.quantized.assemble import Conversion, Reading, convert_by_names
from diffusers_sana.loaders.quantized.checkpoint import Checkpoint
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer
from diffusers_sana.loaders.quantized.rows import unpairs


NAME = "SDNQ"
GROUP = GROUP_SIZES["int4"]


def reading(checkpoint: Checkpoint, class_name: str, base: Mapping[str, Tensor]) -> Reading:
    """How to read a folder.

    Raises:
        ValueError: a kind of SDNQ layers that has no counterpart; it is named.
    """
    settings = checkpoint.quantization
    for option, reason in (
        ("use_hadamard", "rotated weights"),
        ("use_codebook", "codes of a codebook"),
    ):
        if settings.get(option):
            raise ValueError(f"{checkpoint.path} has `{option}`, {reason}, which layers of this package do not have.")
    is_transposed = bool(settings.get("use_quantized_matmul"))
    per_layer = settings.get("modules_dtype_dict") or {}
    weights_dtype = settings.get("weights_dtype", "int4")
    if weights_dtype not in ("int4", "uint4") or per_layer or settings.get("modules_quant_config"):
        raise ValueError(
            f"{checkpoint.path} must have int4 or uint4 layers throughout to be read, got {weights_dtype!r} and "
            f"`modules_dtype_dict` {per_layer}."
        )

    def convert(source: Source, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Conversion:
        def read(name: str, rows: int, columns: int) -> UnpackedLayer | None:
            if f"{name}.scale" not in source:
                return None
            return _layer(source, name, rows, columns, is_transposed, weights_dtype == "uint4")

        return convert_by_names(source, shapes, dtype, {}, read)

    return Reading(convert, checkpoint.tensors)


def _layer(
    source: Source, name: str, rows: int, columns: int, is_transposed: bool, is_unsigned: bool
) -> UnpackedLayer:
    scale = source.take(f"{name}.scale")
    groups = scale.shape[1] if scale.dim() == 3 else 1
    if columns % groups or columns // groups % GROUP:
        raise ValueError(
            f"{name!r} of {source.origin} has groups of {columns / groups:g} weights; a multiple of {GROUP} is needed "
            "to keep the codes."
        )
    repeats = columns // groups // GROUP
    codes = unpairs(source.take(f"{name}.weight").reshape(rows, columns // 2)) ^ 8
    scales = scale.reshape(rows, groups).repeat_interleave(repeats, 1)
    up, down = source.get(f"{name}.svd_up"), source.get(f"{name}.svd_down")
    if up is None or down is None:  # it failed for this layer
        up, down = torch.zeros(rows, 0), torch.zeros(0, columns)
    elif is_transposed:
        up, down = up.t(), down.t()
    zero = source.get(f"{name}.zero_point")
    if is_unsigned or zero is not None:
        # code * scale + zero is (code - 8) * scale and a constant per group, which a branch of rank K/64 adds.
        constant = 8 * scales.float()
        if zero is not None:
            constant = constant + zero.reshape(rows, groups).float().repeat_interleave(repeats, 1)
        up = torch.cat([up.float(), constant], dim=1)
        down = torch.cat([down.float(), torch.eye(columns // GROUP).repeat_interleave(GROUP, 1)])
    bias = source.get(f"{name}.bias", (rows,))
    return UnpackedLayer(codes, scales, None, torch.ones(columns), down, up, bias)
