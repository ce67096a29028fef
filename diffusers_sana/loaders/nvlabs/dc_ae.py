"""Tensor names of mit-han-lab/efficientvit for DC-AE.

The file has no config. Depths, widths, block types and resampling are derived from the shapes. Activations and
shortcuts have no weights and follow from the family: Sana and "in"/"mix" (attention in both halves), Lite (none in the
decoder), DC-AE 1.5 (none).
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusers_sana.loaders.single_file import OfficialWeights, required_shape


CLASS_NAME = "AutoencoderDC"
WRAPPING = re.compile(r"\b(main|op_list)\.")  # modules that only group others
# For a whole key without wrapping. The first and last convolutions keep one level `conv` if they resample.
RULES = (
    (r"(encoder|decoder)\.project_in\.conv\.(.+)", r"\1.conv_in.\2"),
    (r"encoder\.project_out\.0\.conv\.(.+)", r"encoder.conv_out.\1"),
    (r"decoder\.project_out\.0\.(.+)", r"decoder.norm_out.\1"),
    (r"decoder\.project_out\.2\.conv\.(.+)", r"decoder.conv_out.\1"),
)
# For the part of a key after the index of a block in a stage.
IN_BLOCK = (
    (r"conv([12])\.conv\.(weight|bias)", r"conv\1.\2"),
    (r"conv2\.norm\.(\w+)", r"norm.\1"),
    (r"(?:conv\.)?conv\.(weight|bias)", r"conv.\1"),  # the change of resolution
    (r"context_module\.aggreg\.(\d+)\.0\.weight", r"attn.to_qkv_multiscale.\1.proj_in.weight"),
    (r"context_module\.aggreg\.(\d+)\.1\.weight", r"attn.to_qkv_multiscale.\1.proj_out.weight"),
    (r"context_module\.proj\.conv\.weight", r"attn.to_out.weight"),
    (r"context_module\.proj\.norm\.(weight|bias)", r"attn.norm_out.\1"),
    (r"local_module\.(inverted|depth|point)_conv\.conv\.(weight|bias)", r"conv_out.conv_\1.\2"),
    (r"local_module\.point_conv\.norm\.(weight|bias)", r"conv_out.norm.\1"),
)
QKV = "context_module.qkv.conv.weight"
STAGES = {"encoder": "down_blocks", "decoder": "up_blocks"}
SANA_SCALING = 0.41407
SCALING = {32: "in 0.3189, mix 0.4552", 128: "in 0.2889, mix 0.4538", 512: "in 0.4883, mix 0.3620"}  # by channels


def is_official_dc(checkpoint: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of the original DC-AE."""
    return any(key.startswith(("encoder.project_in.", "decoder.project_in.")) for key in checkpoint)


def read_official_dc(checkpoint: Mapping[str, Tensor], **fields: Any) -> OfficialWeights:
    """Derives the config and the name of every tensor.

    Args:
        checkpoint: the tensors by their keys in the file.
        fields: config fields that override those derived from the tensors. `scaling_factor` must be given if files
            with the same tensor shapes have different ones.

    Raises:
        ValueError: an unknown or missing tensor, or a missing field.
    """
    names = {key: _autoencoder_names(key) for key in checkpoint}
    shapes = {name: tuple(checkpoint[key].shape) for key, parts in names.items() for name in parts}
    config: dict[str, Any] = {}
    for half in STAGES:
        columns, resize = _stages(half, shapes)
        config |= {f"{half}_{field}": column for field, column in columns.items()}
        config["downsample_block_type" if half == "encoder" else "upsample_block_type"] = resize
    # Only the grouped convolutions of a scale reveal the head width; all published models have the default.
    if grouped := [shape for name, shape in shapes.items() if name.endswith("proj_out.weight")]:
        config["attention_head_dim"] = grouped[0][1]
    is_batch_norm = [
        any(name.startswith(f"decoder.up_blocks.{i}.") and name.endswith("running_mean") for name in shapes)
        for i in range(len(config["decoder_block_types"]))
    ]
    attends = {half: "EfficientViTBlock" in config[f"{half}_block_types"] for half in STAGES}
    config |= {
        "in_channels": required_shape(shapes, "encoder.conv_in.weight", "encoder.conv_in.conv.weight")[1],
        "latent_channels": required_shape(shapes, "encoder.conv_out.weight")[0],
        "decoder_norm_types": ["batch_norm" if is_batch else "rms_norm" for is_batch in is_batch_norm],
        "decoder_act_fns": ["relu" if is_batch else "silu" for is_batch in is_batch_norm],
        "decoder_conv_act_fn": "relu" if attends["decoder"] else "silu",
        "encoder_out_shortcut": attends["encoder"],
        "decoder_in_shortcut": attends["encoder"],
    }
    if "scaling_factor" not in fields:
        config["scaling_factor"] = _scaling_factor(config)
    return OfficialWeights(CLASS_NAME, {**config, **fields}, names)


def _autoencoder_names(key: str) -> tuple[str, ...]:
    plain = WRAPPING.sub("", key)
    if match := re.fullmatch(r"(encoder|decoder)\.stages\.(\d+)\.(\d+)\.(.+)", plain):
        half, stage, block, inner = match.groups()
        prefix = f"{half}.{STAGES[half]}.{stage}.{block}"
        if inner == QKV:
            return tuple(f"{prefix}.attn.to_{name}.weight" for name in "qkv")
        for pattern, template in IN_BLOCK:
            if found := re.fullmatch(pattern, inner):
                return (f"{prefix}.{found.expand(template)}",)
    for pattern, template in RULES:
        if found := re.fullmatch(pattern, plain):
            return (found.expand(template),)
    raise ValueError(f"{key!r} is in no original DC-AE checkpoint. The checkpoint is for a different architecture.")


def _stages(half: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, list[Any]], str]:
    """The config lists of one half, and its resampling type."""
    blocks: dict[int, dict[int, dict[str, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
    for name, shape in shapes.items():
        if match := re.fullmatch(rf"{half}\.{STAGES[half]}\.(\d+)\.(\d+)\.(.+)", name):
            blocks[int(match[1])][int(match[2])][match[3]] = shape
    if not blocks:
        raise ValueError(f"the file must have tensors of `{half}.stages`, but has none. The file is incomplete.")
    columns: dict[str, list[Any]] = defaultdict(list)
    resizing: dict[int, int] = {}  # stage -> output channels of the resampling convolution
    for i in range(max(blocks) + 1):
        real = [block for block in blocks[i].values() if "conv.weight" not in block]
        for block in blocks[i].values():
            if "conv.weight" in block:
                resizing[i] = block["conv.weight"][0]
        first = real[0] if real else {}
        scales = [shape for key, shape in first.items() if key.endswith("proj_in.weight")]
        width = first.get("conv1.weight") or first.get("attn.to_out.weight") or (0,)
        columns["block_types"].append("EfficientViTBlock" if "attn.to_out.weight" in first else "ResBlock")
        columns["block_out_channels"].append(width[0])
        columns["layers_per_block"].append(len(real))
        columns["qkv_multiscales"].append(tuple(shape[-1] for shape in scales))
    channels = columns["block_out_channels"]
    if not channels[0] and len(channels) > 1:
        channels[0] = (
            channels[1] // 2
        )  # an empty stage has no weights; in published models it is half as wide as the next
    # After an empty stage the first or last convolution resamples. Otherwise any stage reveals the type.
    if half == "encoder":
        is_shuffled = any(out != channels[i + 1] for i, out in resizing.items() if i + 1 < len(channels))
        return columns, "pixel_unshuffle" if is_shuffled else "conv"
    return columns, "pixel_shuffle" if any(out != channels[i] for i, out in resizing.items()) else "interpolate"


def _scaling_factor(config: Mapping[str, Any]) -> float:
    channels = config["latent_channels"]
    if config["downsample_block_type"] == "conv" and channels == 32:
        return SANA_SCALING  # Sana 1.0, 1.1 and Lite share a latent space
    if not config["encoder_out_shortcut"] and len(config["encoder_block_types"]) == 7:
        return 0.5935  # DC-AE 1.5, f64c128
    known = SCALING.get(channels, "those of its authors") if config["encoder_out_shortcut"] else "not published"
    raise ValueError(
        f"`scaling_factor` must be given: the tensors do not determine it, and files of this layout differ in it. "
        f"With {channels} latent channels: {known}."
    )
