"""Tensor names of NVlabs/Sana for Sana, SANA-1.5, SANA-Sprint and their ControlNets; `sana_video` adds SANA-Video's.

Source of the names: the original `.pth` files as the original code and diffusers' converters read them.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusers_sana.loaders.single_file import OfficialWeights, required_shape


TRANSFORMER, CONTROLNET = "SanaTransformer2DModel", "SanaControlNetModel"
HEAD_DIM = 32  # of the linear attention, in all models
CROSS_HEADS = {1152: 16, 2240: 20}  # by width: 600M; 1600M and deeper ones
POSITIONS = {16: None, 32: None, 64: 1.0, 128: 2.0}  # latent side -> interpolation scale of the published models

LEFT_OUT = ("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias")
BASE_ONLY = ("blocks.", "final_layer.")  # a ControlNet file may include the model that it was trained for
TOP = {
    "x_embedder.proj": "patch_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "t_block.1": "time_embed.linear",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
    "controlnet.0.before_proj": "input_block",
}
BLOCK = {
    "scale_shift_table": ("scale_shift_table",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "attn.q_norm": ("attn1.norm_q",),
    "attn.k_norm": ("attn1.norm_k",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "cross_attn.q_norm": ("attn2.norm_q",),
    "cross_attn.k_norm": ("attn2.norm_k",),
    "mlp.inverted_conv.conv": ("ff.conv_inverted",),
    "mlp.depth_conv.conv": ("ff.conv_depth",),
    "mlp.point_conv.conv": ("ff.conv_point",),
    "mlp.t_conv": ("ff.conv_temp",),
}


def is_official_sana(checkpoint: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of the original Sana."""
    return "x_embedder.proj.weight" in checkpoint and "attention_y_norm.weight" in checkpoint


def read_official_sana(
    checkpoint: Mapping[str, Tensor], class_name: str | None = None, **fields: Any
) -> OfficialWeights:
    """Derives the config and the name of every tensor.

    Args:
        checkpoint: the tensors by their keys in the file.
        class_name: `TRANSFORMER` or `CONTROLNET`; by default the ControlNet if the file has one.
        fields: config fields that override those derived from the tensors. A file without a position table does not
            determine `sample_size`, and no file states `timestep_scale` (0.001 in the teachers of SANA-Sprint).

    Raises:
        ValueError: an unknown or missing tensor, or a missing field.
    """
    has_controlnet = any(key.startswith("controlnet.") for key in checkpoint)
    class_name = class_name or (CONTROLNET if has_controlnet else TRANSFORMER)
    official = OfficialWeights(class_name, {})
    other = BASE_ONLY if class_name == CONTROLNET else ("controlnet.",)
    for key in checkpoint:
        if key in LEFT_OUT or key.startswith(other):
            official.left_out.append(key)
        else:
            official.names[key] = names_in_sana(key, guidance="cfg_embedder.mlp.0.weight" in checkpoint)
    official.config = _config(checkpoint, class_name, fields)
    return official


def names_in_sana(key: str, guidance: bool) -> tuple[str, ...]:
    """Our names of the equal parts of a tensor; `guidance` says whether the guidance scale is an input."""
    stem, _, part = key.rpartition(".")
    if part not in ("weight", "bias"):
        stem, part = key, ""
    container, _, inner = stem.partition(".")
    index, _, inner = inner.partition(".")
    names: tuple[str, ...] | None = None
    if container == "blocks":
        names = _in_block(index, inner)
    elif container == "controlnet" and inner.startswith("copied_block."):
        names = _in_block(index, inner.removeprefix("copied_block."))
    elif container == "controlnet" and inner == "after_proj":
        names = (f"controlnet_blocks.{index}",)
    elif stem in ("t_embedder.mlp.0", "t_embedder.mlp.2"):
        names = (f"time_embed.{'' if guidance else 'emb.'}timestep_embedder.linear_{1 if stem.endswith('0') else 2}",)
    names = (TOP[stem],) if stem in TOP else names
    if names is None:
        raise ValueError(f"{key!r} is in no original Sana checkpoint. The checkpoint is for a different architecture.")
    return tuple(f"{name}.{part}" if part else name for name in names)


def _in_block(index: str, stem: str) -> tuple[str, ...] | None:
    names = BLOCK.get(stem)
    return names and tuple(f"transformer_blocks.{index}.{name}" for name in names)


def _config(checkpoint: Mapping[str, Tensor], class_name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {key: tensor.shape for key, tensor in checkpoint.items()}
    block = "controlnet.0.copied_block" if class_name == CONTROLNET else "blocks.0"
    dim, in_channels, patch_size, _ = required_shape(shapes, "x_embedder.proj.weight", rank=4)
    hidden_dim = required_shape(shapes, f"{block}.mlp.inverted_conv.conv.weight", rank=4)[0] // 2
    cross_heads = fields.get("num_cross_attention_heads") or CROSS_HEADS.get(dim)
    if cross_heads is None:
        raise ValueError(
            f"`num_cross_attention_heads` must be given for a width of {dim}, because the tensors do not determine "
            f"it. The original models have {CROSS_HEADS}."
        )
    ratio = hidden_dim / dim
    config = {
        "in_channels": in_channels,
        "num_attention_heads": dim // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "num_layers": len({key.split(".")[1] for key in checkpoint if key.startswith(block.split(".")[0] + ".")}),
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": dim // cross_heads,
        "cross_attention_dim": dim,
        "caption_channels": required_shape(shapes, "y_embedder.y_proj.fc1.weight", rank=2)[1],
        # The model rounds `mlp_ratio * dim` down.
        "mlp_ratio": ratio if int(ratio * dim) == hidden_dim else (hidden_dim + 0.5) / dim,
        "patch_size": patch_size,
        **_positions(checkpoint.get("pos_embed"), patch_size, fields),
    }
    if class_name == TRANSFORMER:
        config["out_channels"] = required_shape(shapes, "final_layer.linear.weight", rank=2)[0] // patch_size**2
        config["guidance_embeds"] = "cfg_embedder.mlp.0.weight" in checkpoint
    else:
        config["wiring"] = "nvlabs"  # only original files have these names, and they were trained in this variant
    if f"{block}.attn.q_norm.weight" in checkpoint:
        config["qk_norm"] = "rms_norm_across_heads"
    return {**config, **fields}


def _positions(table: Tensor | None, patch_size: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`sample_size` and `interpolation_scale`.

    Files may include the position table `[1, N, D]`, which is zero if the model does not use it. Its second token, at
    column 1, begins with the sine of 1 / scale (see `sincos_position_axes`).
    """
    side = 0 if table is None else math.isqrt(table.shape[1]) * patch_size
    sample_size = fields.get("sample_size") or side
    if not sample_size:
        raise ValueError(
            "`sample_size` must be given, because the file has no position table: the side in pixels of the training "
            "images divided by 32, such as 32 for 1024 pixels."
        )
    official = POSITIONS.get(sample_size)
    if table is None or "interpolation_scale" in fields:
        return {"sample_size": sample_size, "interpolation_scale": official}
    first = float(table[0, 1, 0])
    found = round(1 / math.asin(first), 1) if 0 < first < 1 else None
    if sample_size in POSITIONS and found != official:
        raise ValueError(
            f"`interpolation_scale` must be given: the position table of the file has {found}, the published models "
            f"for {32 * sample_size} pixels have {official}. Use that of the file if you trained it yourself."
        )
    return {"sample_size": sample_size, "interpolation_scale": found}
