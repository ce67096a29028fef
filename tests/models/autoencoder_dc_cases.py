"""Layouts of DC-AE for the tests: the official ones, and a small one of each family with real weights."""

from typing import Any

import diffusers
import torch
from torch import nn

from diffusers_sana import AutoencoderDC


SMALL_RATIO = 16


def layout(
    widths: tuple[int, ...],
    encoder_layers: tuple[int, ...],
    decoder_layers: tuple[int, ...],
    *,
    attention: str = "",
    scales: tuple[int, ...] = (),
    **config: Any,
) -> dict[str, Any]:
    """A config whose halves named in `attention` ("e", "d") have attention from stage 3 on."""
    num_stages = len(widths)
    config["encoder_block_out_channels"] = config["decoder_block_out_channels"] = widths
    for half, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        deep = "EfficientViTBlock" if half[0] in attention else "ResBlock"
        config[f"{half}_layers_per_block"] = layers
        config[f"{half}_block_types"] = ("ResBlock",) * 3 + (deep,) * (num_stages - 3)
        config[f"{half}_qkv_multiscales"] = ((),) * 3 + (scales,) * (num_stages - 3)
    return config


def batch_norm_tail(num_stages: int) -> dict[str, Any]:
    """The decoder norms and activations of the `in` and `mix` checkpoints."""
    return {
        "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * (num_stages - 3),
        "decoder_act_fns": ("relu",) * 3 + ("silu",) * (num_stages - 3),
    }


W6 = (128, 256, 512, 512, 1024, 1024)
W7 = (*W6, 2048)
W8 = (*W7, 2048)
SANA = layout(
    W6,
    (2, 2, 2, 3, 3, 3),
    (3, 3, 3, 3, 3, 3),
    attention="ed",
    scales=(5,),
    downsample_block_type="Conv",  # as written in the published configs
    upsample_block_type="interpolate",
    scaling_factor=0.41407,
)
LITE = {
    **SANA,
    "decoder_block_types": "ResBlock",
    "decoder_layers_per_block": (0, 3, 5, 4, 4, 4),
    "upsample_block_type": "pixel_shuffle",
    "decoder_conv_act_fn": "silu",
}
NO_SHORTCUT = {"encoder_out_shortcut": False, "decoder_in_shortcut": False, "decoder_conv_act_fn": "silu"}

OFFICIAL: dict[str, dict[str, Any]] = {
    "f32c32-sana": SANA,
    "f32c32-lite": LITE,
    "f32c32-in": layout(W6, (0, 4, 8, 2, 2, 2), (0, 5, 10, 2, 2, 2), attention="ed", **batch_norm_tail(6)),
    "f64c128-in": layout(
        W7, (0, 4, 8, 2, 2, 2, 2), (0, 5, 10, 2, 2, 2, 2), attention="ed", latent_channels=128, **batch_norm_tail(7)
    ),
    "f128c512-in": layout(
        W8,
        (0, 4, 8, 2, 2, 2, 2, 2),
        (0, 5, 10, 2, 2, 2, 2, 2),
        attention="ed",
        latent_channels=512,
        **batch_norm_tail(8),
    ),
    "f32c128-1.5": layout(W6, (0, 5, 10, 4, 4, 4), (0, 5, 10, 4, 4, 4), latent_channels=128, **NO_SHORTCUT),
    "f64c128-1.5": layout(
        (*W6, 1024), (0, 5, 10, 4, 4, 4, 4), (0, 5, 10, 4, 4, 4, 4), latent_channels=128, **NO_SHORTCUT
    ),
}

_WIDTHS = (8, 8, 16, 16, 32)
_SIZES = {"latent_channels": 8, "attention_head_dim": 8}
_SANA_SIZES = {"scales": (5,), "downsample_block_type": "Conv", **_SIZES}
SMALL: dict[str, dict[str, Any]] = {
    "sana": layout(
        _WIDTHS, (2, 1, 1, 2, 1), (1, 2, 1, 1, 2), attention="ed", upsample_block_type="interpolate", **_SANA_SIZES
    ),
    "two-scales": layout(_WIDTHS, (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), attention="ed", scales=(3, 5), **_SIZES),
    "in": layout(_WIDTHS, (0, 1, 2, 1, 1), (0, 2, 1, 1, 1), attention="ed", **_SIZES, **batch_norm_tail(5)),
    "lite": layout(
        _WIDTHS, (1, 1, 1, 1, 1), (0, 1, 2, 1, 1), attention="e", decoder_conv_act_fn="silu", **_SANA_SIZES
    ),
    "1.5": layout(_WIDTHS, (0, 1, 2, 1, 1), (0, 2, 1, 1, 1), **_SIZES, **NO_SHORTCUT),
}


def small_pair(name: str) -> tuple[AutoencoderDC, diffusers.AutoencoderDC]:
    """Our model and the stock one with the same weights, none of them at a value that hides a mistake."""
    stock = diffusers.AutoencoderDC(**SMALL[name]).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for module in stock.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    ours = AutoencoderDC(**SMALL[name]).eval()
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def small_model(name: str) -> AutoencoderDC:
    """Our model alone, with the weights of `small_pair`."""
    return small_pair(name)[0]


def image(batch: int = 1, height: int = 48, width: int = 80) -> torch.Tensor:
    """`[batch, 3, height, width]` in [-1, 1]."""
    return torch.rand(batch, 3, height, width) * 2 - 1
