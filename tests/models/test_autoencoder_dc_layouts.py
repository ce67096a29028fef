"""Every published layout of DC-AE, on the meta device: keys, shapes, sizes; and configs that must be refused."""

from typing import NamedTuple

import diffusers
import pytest
import torch

from diffusers_sana import AutoencoderDC
from tests.models.autoencoder_dc_cases import OFFICIAL, SMALL


class Published(NamedTuple):
    parameters: int
    batch_norm_buffers: int  # running statistics and counters
    state_dict_keys: int
    compression_ratio: int


PUBLISHED = {
    "f32c32-sana": Published(312_250_275, 0, 375, 32),
    "f32c32-lite": Published(421_181_228, 0, 293, 32),
    "f32c32-in": Published(323_356_460, 12_815, 362, 32),
    "f64c128-in": Published(676_896_140, 12_815, 418, 64),
    "f128c512-in": Published(1_120_682_252, 12_815, 474, 128),
    "f32c128-1.5": Published(523_609_740, 0, 296, 32),
    "f64c128-1.5": Published(714_741_644, 0, 340, 64),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_layout(name):
    with torch.device("meta"):
        ours = AutoencoderDC(**OFFICIAL[name])
        stock = diffusers.AutoencoderDC(**OFFICIAL[name])

    def shapes(model):
        return {key: tuple(value.shape) for key, value in model.state_dict().items()}

    assert shapes(ours) == shapes(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())  # equal order: equal shards
    assert dict(ours.config) == dict(stock.config)
    num_parameters = sum(parameter.numel() for parameter in ours.parameters())
    num_buffered = sum(buffer.numel() for buffer in ours.buffers())
    figures = Published(num_parameters, num_buffered, len(shapes(ours)), ours.spatial_compression_ratio)
    assert figures == PUBLISHED[name]


def test_defaults_are_those_of_diffusers():
    with torch.device("meta"):
        assert dict(AutoencoderDC().config) == dict(diffusers.AutoencoderDC().config)


def test_old_and_third_party_configs_load():
    """Files older than `encoder_out_shortcut` and its like, JSON lists, and keys of a later version."""
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in SMALL["sana"].items()}
    model = AutoencoderDC.from_config({**config, "_class_name": "AutoencoderDC", "made_up": 1})
    assert model.config.encoder_out_shortcut
    assert model.config.decoder_in_shortcut
    assert model.config.decoder_conv_act_fn == "relu"
    assert model.state_dict().keys() == diffusers.AutoencoderDC(**SMALL["sana"]).state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_block_types": "resblock"}, r"`encoder_block_types` must be one of \['Eff.*'ResBlock'\], got 'resb"),
        ({"decoder_norm_types": "layer_norm"}, r"`decoder_norm_types` must be one of .*rms_norm.*got 'layer_norm'"),
        ({"decoder_act_fns": "relu6"}, r"`decoder_act_fns` must be one of .*'silu'.*got 'relu6'"),
        ({"decoder_conv_act_fn": "relu6"}, r"`decoder_conv_act_fn` must be one of .*'silu'.*got 'relu6'"),
        ({"decoder_layers_per_block": (1, 1, 0, 1, 1)}, "`decoder_layers_per_block` .* got 0 for stage 2"),
        ({"encoder_layers_per_block": (1, -1, 1, 1, 1)}, "`encoder_layers_per_block` .* got -1 for stage 1"),
        ({"encoder_layers_per_block": (1, 1)}, "`encoder_layers_per_block` must have one entry for each of the 5"),
        ({"encoder_qkv_multiscales": ((), (), (), (4,), ())}, r"`encoder_qkv_multiscales` .* odd .* got \(4,\)"),
        (
            {"attention_head_dim": 12},
            r"`encoder_block_out_channels` .*`attention_head_dim` \(12\), got 16 for stage 3",
        ),
        ({"latent_channels": 12}, r"`encoder_block_out_channels` .*`latent_channels` \(12\), got 32 for stage 4"),
        ({"decoder_block_out_channels": (8, 8, 16, 16, 40)}, "`decoder_block_out_channels` .* got 40 after 16"),
        ({"encoder_block_out_channels": (8, 64, 16, 16, 32)}, "`encoder_block_out_channels` .* got 64 after 8"),
        (
            {
                "downsample_block_type": "pixel_unshuffle",
                "encoder_block_types": "ResBlock",
                "encoder_block_out_channels": (8, 8, 16, 16, 34),
            },
            r"`encoder_block_out_channels` must be a multiple of 4, for `downsample_block_type.* got 34",
        ),
        ({"encoder_block_out_channels": (8, 16, 16, 32)}, "`decoder_block_out_channels` must have as many stages"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderDC(**{**SMALL["sana"], **change})


def test_refuses_an_empty_only_stage():
    with pytest.raises(ValueError, match="`encoder_layers_per_block` must be positive"):
        AutoencoderDC(
            encoder_block_out_channels=(32,),
            decoder_block_out_channels=(32,),
            encoder_layers_per_block=(0,),
            decoder_layers_per_block=(1,),
            encoder_qkv_multiscales=((),),
            decoder_qkv_multiscales=((),),
        )
