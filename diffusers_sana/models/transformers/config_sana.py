"""Checks of the configs of models with Sana's blocks; errors name the field, before memory is allocated."""

from collections.abc import Mapping
from typing import Any

from diffusers_sana.checks import check_flag, check_integer, check_number


MOST_LAYERS = 1000  # SANA-1.5 has 60
COUNTS = (
    "in_channels",
    "out_channels",
    "num_attention_heads",
    "attention_head_dim",
    "num_cross_attention_heads",
    "cross_attention_head_dim",
    "cross_attention_dim",
    "caption_channels",
    "sample_size",
    "patch_size",
)
VIDEO2_COUNTS = (
    "in_channels",
    "num_attention_heads",
    "attention_head_dim",
    "softmax_head_dim",
    "attn_res_block_size",
    "num_cross_attention_heads",
    "caption_channels",
    "sample_size",
    "rope_max_seq_len",
)
MAY_BE_NONE = ("out_channels", "num_cross_attention_heads", "cross_attention_head_dim", "cross_attention_dim")
FLAGS = ("attention_bias", "norm_elementwise_affine", "guidance_embeds")


def check_transformer_config(config: Mapping[str, Any]) -> None:
    """Raises if a field has an invalid type or value, or if the widths are inconsistent.

    Args:
        config: of `SanaTransformer2DModel`, or of `SanaControlNetModel`, which has fewer fields.

    Raises:
        TypeError, ValueError: naming the field.
    """
    for name in COUNTS:
        if config[name] is not None or name not in MAY_BE_NONE:
            check_integer(name, config[name])
    check_integer("num_layers", config["num_layers"], at_most=MOST_LAYERS)
    for name in FLAGS:
        if name in config:
            check_flag(name, config[name])
    check_number("mlp_ratio", config["mlp_ratio"], above=0)
    check_number("dropout", config["dropout"], at_least=0, at_most=1)
    check_number("norm_eps", config["norm_eps"], above=0, at_most=1)
    for name in ("interpolation_scale", "timestep_scale"):
        if config.get(name) is not None:
            check_number(name, config[name], above=0)
    if "guidance_embeds_scale" in config:
        check_number("guidance_embeds_scale", config["guidance_embeds_scale"])
    if config["patch_size"] > config["sample_size"]:
        raise ValueError(
            f"`patch_size` must be at most `sample_size`, got {config['patch_size']} and {config['sample_size']}."
        )
    if int(config["mlp_ratio"] * config["num_attention_heads"] * config["attention_head_dim"]) < 1:
        raise ValueError(f"`mlp_ratio` must leave the feed-forward a channel, got {config['mlp_ratio']}.")
    _check_widths(config)


def check_video_transformer_config(config: Mapping[str, Any]) -> None:
    """`check_transformer_config` for the config of `SanaVideoTransformer3DModel`."""
    _check_video_patches(config["patch_size"])
    check_integer("rope_max_seq_len", config["rope_max_seq_len"])
    # It has no table of positions, and its `sample_size` names the table of trained sizes.
    check_transformer_config({**config, "patch_size": 1, "interpolation_scale": None})
    if config["attention_head_dim"] % 2:
        raise ValueError(
            f"`attention_head_dim` must be even, since rotary positions turn pairs of channels, got "
            f"{config['attention_head_dim']}."
        )


def check_video2_transformer_config(config: Mapping[str, Any]) -> None:
    """Raises if a field of `SanaVideo2Transformer3DModel` has an invalid type or value, or if widths do not fit.

    Raises:
        TypeError, ValueError: naming the field.
    """
    _check_video_patches(config["patch_size"])
    for name in VIDEO2_COUNTS:
        check_integer(name, config[name])
    if config["out_channels"] is not None:
        check_integer("out_channels", config["out_channels"])
    number = config["num_layers"]
    check_integer("num_layers", number, at_most=MOST_LAYERS)
    check_number("mlp_ratio", config["mlp_ratio"], above=0)
    check_flag("relu_divisor", config["relu_divisor"])
    for layer in config["softmax_layers"] or ():
        check_integer("softmax_layers", layer, at_least=0, at_most=number - 1)
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    for name, size in (
        ("softmax_head_dim", config["softmax_head_dim"]),
        ("num_cross_attention_heads", config["num_cross_attention_heads"]),
    ):
        if dim % size:
            raise ValueError(
                f"`{name}` must divide `num_attention_heads * attention_head_dim` = {dim}, got {size}. Change one of"
                " the two."
            )
    for name in ("attention_head_dim", "softmax_head_dim"):
        if config[name] % 2:
            raise ValueError(
                f"`{name}` must be even, since rotary positions turn pairs of channels, got {config[name]}."
            )


def _check_video_patches(patch_size: Any) -> None:
    if not isinstance(patch_size, list | tuple) or len(patch_size) != 3:
        raise TypeError(f"`patch_size` must be three integers (frames, height, width), got {patch_size!r}.")
    for side in patch_size:
        check_integer("patch_size", side)


def _check_widths(config: Mapping[str, Any]) -> None:
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    heads, head_dim, text_dim = (config[name] for name in MAY_BE_NONE[1:])
    if heads is None or head_dim is None or text_dim is None:
        raise ValueError(
            "`num_cross_attention_heads`, `cross_attention_head_dim` and `cross_attention_dim` must be given: "
            f"every block attends to the text, got {heads}, {head_dim} and {text_dim}. Set "
            f"`cross_attention_dim={dim}`."
        )
    if heads * head_dim != dim:
        raise ValueError(
            "`num_cross_attention_heads * cross_attention_head_dim` must be `num_attention_heads * "
            f"attention_head_dim` = {dim}, got {heads} * {head_dim} = {heads * head_dim}. Change one of the two."
        )
    if text_dim != dim:
        raise ValueError(
            "`cross_attention_dim` must be `num_attention_heads * attention_head_dim` = "
            f"{dim}, the width the text is projected to, got {text_dim}. Set it to {dim}."
        )
    qk_norm = config["qk_norm"]
    if qk_norm not in (None, "rms_norm_across_heads"):
        raise ValueError(
            f'`qk_norm` must be None or "rms_norm_across_heads", got {qk_norm!r}. Norms of single heads do not '
            "apply: queries and keys are normed before the heads are split."
        )
    if config["interpolation_scale"] is not None and dim % 4:
        raise ValueError(
            "`num_attention_heads * attention_head_dim` must be a multiple of 4 for a positional table, got "
            f"{dim}. Change the heads, or set `interpolation_scale=None`."
        )
