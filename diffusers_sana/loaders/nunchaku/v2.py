"""Names and fused layers of Qwen-Image, Z-Image and SDXL in Nunchaku's files, and of any model in Nunchaku-Lite's."""

from collections.abc import Mapping

import torch

from diffusers_sana.loaders.nunchaku.layers import LITE_NAMES, read_adaln, read_awq, read_svdq, without_shift
from diffusers_sana.loaders.quantized.assemble import Conversion, convert_by_names
from diffusers_sana.loaders.quantized.layer import Source, UnpackedLayer
from diffusers_sana.loaders.quantized.names import Scheme


SCHEMES: dict[str, Scheme] = {
    "QwenImageTransformer2DModel": {
        "*.attn.to_qkv": ("*.attn.to_q", "*.attn.to_k", "*.attn.to_v"),
        "*.attn.add_qkv_proj": ("*.attn.add_q_proj", "*.attn.add_k_proj", "*.attn.add_v_proj"),
    },
    "ZImageTransformer2DModel": {
        "*.attention.to_qkv": ("*.attention.to_q", "*.attention.to_k", "*.attention.to_v"),
        "*.feed_forward.net.0.proj": ("*.feed_forward.w3", "*.feed_forward.w1"),  # value, then gate
        "*.feed_forward.net.2": ("*.feed_forward.w2",),
    },
    "UNet2DConditionModel": {"*.attn1.to_qkv": ("*.attn1.to_q", "*.attn1.to_k", "*.attn1.to_v")},
}
SHIFTED = (".img_mlp.net.2", ".txt_mlp.net.2")  # Qwen-Image's; their input is the output of GELU plus a constant
ADALN = (".img_mod.1", ".txt_mod.1")
ADALN_SPLITS = 6


def convert_v2(source: Source, shapes: Mapping[str, torch.Size], dtype: torch.dtype, class_name: str) -> Conversion:
    """Converts a file in the names of Nunchaku's Python modules; see `assemble.Converter`."""

    def read(name: str, rows: int, columns: int) -> UnpackedLayer | None:
        if f"{name}.qweight" not in source:
            return None
        if f"{name}.wzeros" in source:
            if name.endswith(ADALN):
                return read_adaln(source, name, rows, columns, ADALN_SPLITS)
            return read_awq(source, name, rows, columns)
        names = LITE_NAMES if f"{name}.smooth_factor" in source else {}
        layer = read_svdq(source, name, rows, columns, names)
        return without_shift(layer) if name.endswith(SHIFTED) else layer

    return convert_by_names(source, shapes, dtype, SCHEMES[class_name], read)
