"""Checkpoints by the authors' names, made from tiny models: the names are written out here once more."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn


WIDTH = 64  # heads of 32, as everywhere
SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": WIDTH // 32,
    "attention_head_dim": 32,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": WIDTH // 2,
    "cross_attention_dim": WIDTH,
    "caption_channels": 16,
    "sample_size": 32,
}
SANA_NAMES = {
    "patch_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm",
    "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.guidance_embedder.linear_1": "cfg_embedder.mlp.0",
    "time_embed.guidance_embedder.linear_2": "cfg_embedder.mlp.2",
    "time_embed.linear": "t_block.1",
    "proj_out": "final_layer.linear",
    "input_block": "controlnet.0.before_proj",
    "attn1.to_out.0": "attn.proj",
    "attn1.norm_q": "attn.q_norm",
    "attn1.norm_k": "attn.k_norm",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "attn2.norm_q": "cross_attn.q_norm",
    "attn2.norm_k": "cross_attn.k_norm",
    "ff.conv_inverted": "mlp.inverted_conv.conv",
    "ff.conv_depth": "mlp.depth_conv.conv",
    "ff.conv_point": "mlp.point_conv.conv",
    "ff.conv_temp": "mlp.t_conv",
    "patch_embedding": "x_embedder.proj",
}
FUSED = {"attn1.to_{}": ("attn.qkv", "qkv"), "attn2.to_{}": ("cross_attn.kv_linear", "kv")}


def position_table(side: int, width: int, scale: float | None) -> Tensor:
    """`[1, side * side, width]` as the authors store it: zeros where the model has no positions."""
    if scale is None:
        return torch.zeros(1, side * side, width)
    frequencies = 10000 ** (-torch.arange(width // 4) / (width / 4))
    angles = torch.arange(side)[:, None] / scale * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis.expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None]


def official_sana(model: nn.Module, scale: float | None = None, block: str = "blocks.{}") -> dict[str, Tensor]:
    """The content of a `.pth` with this transformer or ControlNet (`block="controlnet.{}.copied_block"`)."""
    state = dict(model.state_dict())
    for pattern, (fused, letters) in FUSED.items():
        first = pattern.format(letters[0])
        for key in [key for key in state if f".{first}." in key]:
            parts = [state.pop(key.replace(first, pattern.format(letter))) for letter in letters]
            state[key.replace(first, fused)] = torch.cat(parts)
    out = {}
    for key, value in state.items():
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", key)
        prefix, key = (block.format(match[1]) + ".", match[2]) if match else ("", key)
        stem, _, part = key.rpartition(".")
        if not match and key == "scale_shift_table":
            key = "final_layer.scale_shift_table"
        elif stem.startswith("controlnet_blocks."):
            key = f"controlnet.{stem.split('.')[1]}.after_proj.{part}"
        elif stem in SANA_NAMES:
            key = f"{SANA_NAMES[stem]}.{part}"
        out[prefix + key] = value
    out["y_embedder.y_embedding"] = torch.randn(300, model.config.caption_channels)
    if "patch_embedding.weight" in state:  # of videos
        return out | {"pos_embed": torch.zeros(1, 16, WIDTH), "logvar_linear.weight": torch.zeros(1, WIDTH)}
    out["pos_embed"] = position_table(model.config.sample_size, WIDTH, scale)
    return out


DC_NAMES = (
    (r"(..)coder\.conv_in\.(conv\.)?(\w+)$", r"\1coder.project_in.{in}conv.\2\3"),
    (r"encoder\.conv_out\.(\w+)$", r"encoder.project_out.{out}op_list.0.conv.\1"),
    (r"decoder\.norm_out\.(\w+)$", r"decoder.project_out.op_list.0.\1"),
    (r"decoder\.conv_out\.(conv\.)?(\w+)$", r"decoder.project_out.op_list.2.conv.\1\2"),
)
DC_BLOCK = {
    r"conv([12])\.(weight|bias)": r"main.conv\1.conv.\2",
    r"norm\.(\w+)": r"main.conv2.norm.\1",
    r"conv\.(\w+)": r"main.{resize}conv.\1",
    r"attn\.to_qkv_multiscale\.(\d+)\.proj_in\.weight": r"context_module.main.aggreg.\1.0.weight",
    r"attn\.to_qkv_multiscale\.(\d+)\.proj_out\.weight": r"context_module.main.aggreg.\1.1.weight",
    r"attn\.to_out\.weight": r"context_module.main.proj.conv.weight",
    r"attn\.norm_out\.(\w+)": r"context_module.main.proj.norm.\1",
    r"conv_out\.conv_(inverted|depth|point)\.(\w+)": r"local_module.main.\1_conv.conv.\2",
    r"conv_out\.norm\.(\w+)": r"local_module.main.point_conv.norm.\1",
}


def official_dc(model: nn.Module) -> dict[str, Tensor]:
    """The content of a file with this autoencoder."""
    state = dict(model.state_dict())
    for key in [key for key in state if key.endswith("attn.to_q.weight")]:
        rows = [state.pop(key.replace("to_q", f"to_{letter}")) for letter in "qkv"]
        state[key.replace("attn.to_q.weight", "qkv")] = torch.cat(rows)[..., None, None]
    out = {}
    for key, value in state.items():
        match = re.fullmatch(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\d+)\.(.+)", key)
        if match:
            half, stage, block, rest = match.groups()
            names = ["context_module.main.qkv.conv.weight"] if rest == "qkv" else []
            names += [found.expand(to) for pattern, to in DC_BLOCK.items() if (found := re.fullmatch(pattern, rest))]
            # Where channels become pixels or pixels channels, the convolution lies one level deeper.
            is_plain = half == "encoder" and model.config.downsample_block_type.lower() == "conv"
            name = names[0].replace("{resize}", "" if is_plain else "conv.")
            out[f"{half}.stages.{stage}.op_list.{block}.{name}"] = (
                value[..., None, None] if name.endswith("proj.conv.weight") else value
            )
        else:
            name = next(found.expand(to) for pattern, to in DC_NAMES if (found := re.fullmatch(pattern, key)))
            is_decoder_in = key.startswith("decoder.conv_in") and model.config.decoder_in_shortcut
            name = name.replace("{in}", "main." if is_decoder_in else "")
            out[name.replace("{out}", "main." if model.config.encoder_out_shortcut else "")] = value
    return out


def assert_equal_weights(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Every weight, bit for bit."""
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
