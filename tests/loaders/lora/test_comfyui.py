"""LoRA by the authors' names: what ComfyUI would add to the authors' weights is what we add to ours."""

import diffusers
import pytest
import torch

from diffusers_sana.loaders.lora.comfyui import lora_to_comfyui
from tests import tiny
from tests.loaders.lora.lora_files import FORMATS, by_authors_names, plain, random_lora, written
from tests.numerics import assert_close_fp32


@pytest.fixture(scope="module")
def lora():
    return random_lora(tiny.transformer(diffusers, guidance_embeds=True))


def added(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ComfyUI adds to each weight: alpha / rank * up @ down, the axes behind the first two in `down`."""
    out = {}
    for name in sorted(key.removesuffix(".alpha") for key in state_dict if key.endswith(".alpha")):
        down, up = state_dict[f"{name}.lora_down.weight"], state_dict[f"{name}.lora_up.weight"]
        product = up.flatten(1) @ down.flatten(1)
        out[name] = state_dict[f"{name}.alpha"] / len(down) * product.reshape(len(up), *down.shape[1:])
    return out


def assert_same_weights(actual, expected):
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert_close_fp32(actual[name], weight)


@pytest.mark.parametrize("name", ["kohya", "ComfyUI", None])
def test_added_weights(lora, name):
    state_dict = FORMATS[name](lora) if name else plain(lora)
    exported = lora_to_comfyui(state_dict)
    assert {key.rpartition(".")[2] for key in exported} == {"weight", "alpha"}
    assert_same_weights(added(exported), added(written(by_authors_names(lora), "diffusion_model.")))


def test_parts_that_are_alike_in_nothing(lora):
    """Queries of another rank and scale, no keys: A differs, and rows are zero."""
    query, value = torch.randn(4, 16), torch.randn(2, 16)
    ups = torch.randn(16, 4), torch.randn(16, 2)
    attention = "transformer.transformer_blocks.1.attn1"
    state_dict = {f"{attention}.to_q.lora_A.weight": query, f"{attention}.to_q.lora_B.weight": ups[0]}
    state_dict |= {f"{attention}.to_v.lora_A.weight": value, f"{attention}.to_v.lora_B.weight": ups[1]}
    weight = added(lora_to_comfyui(state_dict, {"lora_alpha": 3}))["diffusion_model.blocks.1.attn.qkv"]
    assert_close_fp32(weight, torch.cat([3 / 4 * ups[0] @ query, torch.zeros(16, 16), 3 / 2 * ups[1] @ value]))


def test_dora_is_refused():
    name = "lora_unet_blocks_0_attn_proj"
    state_dict = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    with pytest.raises(ValueError, match=r"attn1.to_out.0.lora_magnitude_vector' must be a factor of a plain LoRA"):
        lora_to_comfyui({**state_dict, f"{name}.dora_scale": torch.ones(8, 1)})


def test_the_text_encoder_is_refused(lora):
    name = "text_encoder.layers.0.self_attn.q_proj"
    text = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(ValueError, match=rf"'{name}.lora_A.weight' changes the text encoder, .* Leave such keys out"):
        lora_to_comfyui(plain(lora) | text)


def test_depthwise_layers_are_refused():
    """ComfyUI would add the product to the layer's own weights, which is another change than the trained one."""
    layers = random_lora(tiny.transformer(diffusers), depthwise=True)
    with pytest.raises(ValueError, match=r"conv_depth.lora_A.weight' changes a depthwise convolution"):
        lora_to_comfyui(FORMATS["OneTrainer"](layers))
