"""The stages of encoder and decoder, parsed from the lists of the model's config and validated."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.models.activations import ACT2CLS

from diffusers_sana.checks import LARGEST, check_flag, check_integer, check_number


BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")
NORM_TYPES = ("rms_norm", "batch_norm")
MOST_LAYERS = 1000  # per stage; the original models have up to 12
LARGEST_KERNEL = 255  # the original models have 5
COUNTS = ("in_channels", "latent_channels", "attention_head_dim")
NAMES = ("upsample_block_type", "downsample_block_type", "decoder_conv_act_fn")
FLAGS = ("encoder_out_shortcut", "decoder_in_shortcut")


@dataclass(frozen=True)
class StageConfig:
    """`num_layers` equal blocks at one resolution. Stage 0 may be empty: the end convolution then resizes by 2."""

    block_type: str
    channels: int
    num_layers: int
    kernel_sizes: tuple[int, ...]
    norm_type: str
    act_fn: str
    head_dim: int


def check_autoencoder_config(config: Mapping[str, Any]) -> None:
    """Raises if a field of the config of `AutoencoderDC` is invalid; fields per stage are checked by `stage_configs`.

    Raises:
        TypeError, ValueError: naming the field.
    """
    for name in COUNTS:
        check_integer(name, config[name])
    for name in FLAGS:
        check_flag(name, config[name])
    for name in NAMES:
        if not isinstance(config[name], str):
            raise TypeError(f"`{name}` must be a name, got {config[name]!r}.")
    check_number("scaling_factor", config["scaling_factor"], above=0)
    counts = []
    for half in ("encoder", "decoder"):
        widths = config[f"{half}_block_out_channels"]
        if not isinstance(widths, list | tuple) or not widths:
            raise TypeError(
                f"`{half}_block_out_channels` must be a list with the width of each stage, got {widths!r}."
            )
        counts.append(len(widths))
    if counts[0] != counts[1]:
        raise ValueError(
            "`decoder_block_out_channels` must have as many stages as `encoder_block_out_channels`, "
            f"{counts[0]}, got {counts[1]}. Otherwise decoded images would have another size."
        )


def stage_configs(half: str, config: Mapping[str, Any]) -> list[StageConfig]:
    """The stages of one half, counted from the pixels inwards.

    Args:
        half: `"encoder"`, whose norms and activations are fixed, or `"decoder"`.
        config: the config of `AutoencoderDC`.

    Raises:
        TypeError: a field that is not a list.
        ValueError: unknown names, numbers out of range, lists of unequal length, or inconsistent widths.
    """
    channels = config[f"{half}_block_out_channels"]
    fields = {
        "block_types": config[f"{half}_block_types"],
        "block_out_channels": channels,
        "layers_per_block": config[f"{half}_layers_per_block"],
        "qkv_multiscales": config[f"{half}_qkv_multiscales"],
        "norm_types": config["decoder_norm_types"] if half == "decoder" else "rms_norm",
        "act_fns": config["decoder_act_fns"] if half == "decoder" else "silu",
    }
    columns = []
    for name, value in fields.items():
        if not isinstance(value, str | list | tuple):
            raise TypeError(f"`{half}_{name}` must be a list with one entry for each stage, got {value!r}.")
        column = [value] * len(channels) if isinstance(value, str) else list(value)
        if len(column) != len(channels):
            raise ValueError(
                f"`{half}_{name}` must have one entry for each of the {len(channels)} stages in "
                f"`{half}_block_out_channels`, got {len(column)}: {value}."
            )
        columns.append(column)
    for width, num_layers, kernel_sizes in zip(columns[1], columns[2], columns[3], strict=True):
        check_integer(f"{half}_block_out_channels", width)
        check_integer(f"{half}_layers_per_block", num_layers, at_least=-LARGEST, at_most=MOST_LAYERS)
        if not isinstance(kernel_sizes, list | tuple):
            raise TypeError(f"`{half}_qkv_multiscales` must be a list of lists, got {kernel_sizes!r} in it.")
        for size in kernel_sizes:
            check_integer(f"{half}_qkv_multiscales", size, at_least=-LARGEST, at_most=LARGEST_KERNEL)
    head_dim = config["attention_head_dim"]
    stages = [
        StageConfig(block_type, width, num_layers, tuple(kernel_sizes), norm_type, str(act_fn).lower(), head_dim)
        for block_type, width, num_layers, kernel_sizes, norm_type, act_fn in zip(*columns, strict=True)
    ]
    _check_stages(half, stages, config)
    return stages


def _check_stages(half: str, stages: Sequence[StageConfig], config: Mapping[str, Any]) -> None:
    unshuffle = half == "encoder" and config["downsample_block_type"] == "pixel_unshuffle"
    for i, stage in enumerate(stages):
        _check_known(f"{half}_block_types", stage.block_type, BLOCK_TYPES)
        _check_known(f"{half}_norm_types", stage.norm_type, NORM_TYPES)
        _check_known(f"{half}_act_fns", stage.act_fn, ACT2CLS)
        may_be_empty = i == 0 and len(stages) > 1
        if stage.num_layers < 0 or (stage.num_layers == 0 and not may_be_empty):
            raise ValueError(
                f"`{half}_layers_per_block` must be positive (only the first of several may be 0), got "
                f"{stage.num_layers} for stage {i}."
            )
        if stage.block_type == "EfficientViTBlock":
            _check_multiple(half, i, stage.channels, stage.head_dim, "`attention_head_dim`")
            if any(size < 1 or size % 2 == 0 for size in stage.kernel_sizes):
                raise ValueError(f"`{half}_qkv_multiscales` must hold odd kernel sizes, got {stage.kernel_sizes}.")
        if i > 0:
            if unshuffle:
                _check_multiple(half, i, stage.channels, 4, "4, for `downsample_block_type='pixel_unshuffle'`")
            # A shortcut averages groups of channels when downsampling, and repeats them when upsampling.
            if stages[i - 1].num_layers > 0 and 4 * stages[i - 1].channels % stage.channels:
                raise ValueError(
                    f"`{half}_block_out_channels` must divide 4 times the width of the stage before, got "
                    f"{stage.channels} after {stages[i - 1].channels} for stage {i}."
                )
    if half == "decoder":
        _check_known("decoder_conv_act_fn", config["decoder_conv_act_fn"].lower(), ACT2CLS)
    if config["encoder_out_shortcut" if half == "encoder" else "decoder_in_shortcut"]:
        _check_multiple(half, len(stages) - 1, stages[-1].channels, config["latent_channels"], "`latent_channels`")


def _check_known(argument: str, name: str, known: Collection[str]) -> None:
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"`{argument}` must be one of {sorted(known)}, got {name!r}.")


def _check_multiple(half: str, stage: int, channels: int, factor: int, meaning: str) -> None:
    if channels % factor:
        raise ValueError(
            f"`{half}_block_out_channels` must be a multiple of {meaning} ({factor}), got {channels} for stage "
            f"{stage}."
        )
