"""The pixel decoder against that of `transformers`' Janus, which has the same structure, and the official layout."""

import pytest
import torch
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from diffusers_sana.models.vila_u.configuration_vila_u import VilaUVisionConfig
from diffusers_sana.models.vila_u.decoder_vila_u import VilaUPixelDecoder, resize_latents
from tests.models.vila_u.tiny import tiny_vision_config
from tests.numerics import assert_close_fp32


LAYOUTS = {"tiny": {}, "wide": {"decoder_channel_multipliers": (1, 2, 2, 4), "decoder_num_res_blocks": 2}}


def official_decoder():
    with torch.device("meta"):
        return VilaUPixelDecoder(VilaUVisionConfig())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_janus(layout):
    config = tiny_vision_config(**layout)
    ours = VilaUPixelDecoder(config)
    theirs = JanusVQVAEDecoder(
        JanusVQVAEConfig(
            base_channels=config.decoder_base_channels,
            channel_multiplier=list(config.decoder_channel_multipliers),
            num_res_blocks=config.decoder_num_res_blocks,
            latent_channels=config.latent_channels,
            out_channels=config.num_channels,
        )
    ).eval()
    last = len(config.decoder_channel_multipliers) - 1  # their levels count from the coarsest one
    renamed = {
        f"up.{last - int(name.split('.')[1])}.{name.split('.', 2)[2]}" if name.startswith("up.") else name: tensor
        for name, tensor in ours.state_dict().items()
    }
    theirs.load_state_dict(renamed)
    latents = torch.randn(2, config.latent_channels, 4, 4, requires_grad=True)
    out, expected = ours(latents), theirs(latents)
    assert out.shape == (2, 3, 32, 32)
    assert_close_fp32(out, expected)
    weights = torch.randn_like(out)
    assert_close_fp32(*(torch.autograd.grad((each * weights).sum(), latents)[0] for each in (out, expected)))


def test_official_layout():
    decoder = official_decoder()
    shapes = {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert len(shapes) == 194
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 42_449_795
    assert shapes["conv_in.weight"] == [512, 256, 3, 3]
    assert shapes["conv_out.weight"] == [3, 128, 3, 3]
    assert shapes["mid.attn_1.proj_out.weight"] == [512, 512, 1, 1]
    levels = {4: (512, 512), 3: (512, 256), 2: (256, 256), 1: (256, 128), 0: (128, 128)}
    for level, (wide, width) in levels.items():
        assert shapes[f"up.{level}.block.0.conv1.weight"] == [width, wide, 3, 3]
        assert shapes[f"up.{level}.block.2.conv2.weight"] == [width, width, 3, 3]
        assert (f"up.{level}.block.0.nin_shortcut.weight" in shapes) == (wide != width)
        assert (f"up.{level}.attn.2.q.weight" in shapes) == (level == 4)
        assert (f"up.{level}.upsample.conv.weight" in shapes) == (level > 0)
        assert f"up.{level}.block.3.conv1.weight" not in shapes


def test_resolution_of_each_level():
    decoder, sizes = official_decoder(), {}
    for level, module in enumerate(decoder.up):
        module.register_forward_pre_hook(lambda _, args, level=level: sizes.update({level: args[0].shape[-1]}))
    out = decoder(torch.empty(1, 256, 16, 16, device="meta"))
    assert sizes == {4: 16, 3: 32, 2: 64, 1: 128, 0: 256}
    assert out.shape == (1, 3, 256, 256)


def test_every_weight_counts():
    decoder = VilaUPixelDecoder(tiny_vision_config())
    decoder(torch.randn(1, 32, 4, 4)).square().sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("k.bias"):  # softmax does not see what all keys share
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resize_is_bilinear_in_fp32(dtype):
    """Three points to two: each new pixel's centre lies a quarter of a cell outside an old one's."""
    latents = torch.randn(1, 2, 3, 3).to(dtype)
    along = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.25, 0.75]])
    expected = (along @ latents.float() @ along.T).to(dtype)
    out = resize_latents(latents, 2)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)
