"""The names of NVlabs/Sana for the weights of Sana, SANA-1.5, SANA-Sprint and their ControlNets.

Source of the names: the `.pth` files of the authors as their code and diffusers' converters read them.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusers_sana.loaders.single_file import OfficialWeights


TRANSFORMER, CONTROLNET = "SanaTransformer2DModel", "SanaControlNetModel"
HEAD_DIM = 32  # of the linear attention, in all models
CROSS_HEADS = {1152: 16, 2240: 20}  # by width: 600M; 1600M and deeper ones
POSITIONS = {16: None, 32: None, 64: 1.0, 128: 2.0}  # interpolation scale of the published models, by latent side

LEFT_OUT = ("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias")
BASE_ONLY = ("blocks.", "final_layer.")  # a ControlNet's file may hold the model that it was trained for
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
}


def is_official_sana(checkpoint: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of the authors' Sana."""
    return "x_embedder.proj.weight" in checkpoint and "attention_y_norm.weight" in checkpoint


def read_official_sana(
    checkpoint: Mapping[str, Tensor], class_name: str | None = None, **fields: Any
) -> OfficialWeights:
    """Finds the variant and the place of every tensor.

    Args:
        checkpoint: the tensors by their keys in the file.
        class_name: `TRANSFORMER` or `CONTROLNET`; by default the ControlNet where the file has one.
        fields: of the config, in place of what is read off the tensors. A file without a table of positions does not
            tell `sample_size`, and no file tells `timestep_scale` (0.001 in the teachers of SANA-Sprint).

    Raises:
        ValueError: an unknown tensor, one that is missing, a field that must be given.
    """
    has_controlnet = any(key.startswith("controlnet.") for key in checkpoint)
    class_name = class_name or (CONTROLNET if has_controlnet else TRANSFORMER)
    official = OfficialWeights(class_name, {})
    other = BASE_ONLY if class_name == CONTROLNET else ("controlnet.",)
    for key in checkpoint:
        if key in LEFT_OUT or key.startswith(other):
            official.left_out.append(key)
        else:
            official.names[key] = _our_names(key, guidance="cfg_embedder.mlp.0.weight" in checkpoint)
    official.config = _config(checkpoint, class_name, fields)
    return official


def _our_names(key: str, guidance: bool) -> tuple[str, ...]:
    stem, _, part = key.rpartition(".")
    if part not in ("weight", "bias"):
        stem, part = key, ""
    container, _, rest = stem.partition(".")
    index, _, rest = rest.partition(".")
    names: tuple[str, ...] | None = None
    if container == "blocks":
        names = _in_block(index, rest)
    elif container == "controlnet" and rest.startswith("copied_block."):
        names = _in_block(index, rest.removeprefix("copied_block."))
    elif container == "controlnet" and rest == "after_proj":
        names = (f"controlnet_blocks.{index}",)
    elif stem in ("t_embedder.mlp.0", "t_embedder.mlp.2"):
        names = (f"time_embed.{'' if guidance else 'emb.'}timestep_embedder.linear_{1 if stem.endswith('0') else 2}",)
    names = (TOP[stem],) if stem in TOP else names
    if names is None:
        raise ValueError(f"{key!r} is unknown: no Sana of the authors has it. The file is of another model.")
    return tuple(f"{name}.{part}" if part else name for name in names)


def _in_block(index: str, stem: str) -> tuple[str, ...] | None:
    names = BLOCK.get(stem)
    return names and tuple(f"transformer_blocks.{index}.{name}" for name in names)


def _config(checkpoint: Mapping[str, Tensor], class_name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    block = "controlnet.0.copied_block" if class_name == CONTROLNET else "blocks.0"
    dim, in_channels, patch_size, _ = _shape(checkpoint, "x_embedder.proj.weight", 4)
    hidden_dim = _shape(checkpoint, f"{block}.mlp.inverted_conv.conv.weight", 4)[0] // 2
    cross_heads = fields.get("num_cross_attention_heads") or CROSS_HEADS.get(dim)
    if cross_heads is None:
        raise ValueError(
            f"`num_cross_attention_heads` must be given for a width of {dim}: the tensors do not tell. The authors' "
            f"models have {CROSS_HEADS}."
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
        "caption_channels": _shape(checkpoint, "y_embedder.y_proj.fc1.weight", 2)[1],
        # The model rounds `mlp_ratio * dim` down.
        "mlp_ratio": ratio if int(ratio * dim) == hidden_dim else (hidden_dim + 0.5) / dim,
        "patch_size": patch_size,
        **_positions(checkpoint.get("pos_embed"), patch_size, fields),
    }
    if class_name == TRANSFORMER:
        config["out_channels"] = _shape(checkpoint, "final_layer.linear.weight", 2)[0] // patch_size**2
        config["guidance_embeds"] = "cfg_embedder.mlp.0.weight" in checkpoint
    else:
        config["wiring"] = "nvlabs"  # only the authors' files have these names, and they were trained in this wiring
    if f"{block}.attn.q_norm.weight" in checkpoint:
        config["qk_norm"] = "rms_norm_across_heads"
    return {**config, **fields}


def _positions(table: Tensor | None, patch_size: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`sample_size` and `interpolation_scale`.

    Files may hold the table of positions `[1, N, D]`, zeros where the model does not use it. The second token of a
    row, at column 1, begins with the sine of 1 / scale (see `sincos_position_axes`).
    """
    side = 0 if table is None else math.isqrt(table.shape[1]) * patch_size
    sample_size = fields.get("sample_size") or side
    if not sample_size:
        raise ValueError(
            "`sample_size` must be given, as the file has no table of positions: the side in pixels of the pictures "
            "that the model was trained for, over 32, such as 32 for 1024 pixels."
        )
    official = POSITIONS.get(sample_size)
    if table is None or "interpolation_scale" in fields:
        return {"sample_size": sample_size, "interpolation_scale": official}
    first = float(table[0, 1, 0])
    found = round(1 / math.asin(first), 1) if 0 < first < 1 else None
    if sample_size in POSITIONS and found != official:
        raise ValueError(
            f"`interpolation_scale` must be given: the table of positions in the file says {found}, the published "
            f"models for {32 * sample_size} pixels have {official}. Take the file's word if you trained it yourself."
        )
    return {"sample_size": sample_size, "interpolation_scale": found}


def _shape(checkpoint: Mapping[str, Tensor], key: str, rank: int) -> tuple[int, ...]:
    if key not in checkpoint or checkpoint[key].ndim != rank:
        what = "has none" if key not in checkpoint else f"it has {checkpoint[key].ndim}"
        raise ValueError(
            f"the file must have {key!r} with {rank} axes, but {what}. It is not whole, or of another model."
        )
    return tuple(checkpoint[key].shape)
