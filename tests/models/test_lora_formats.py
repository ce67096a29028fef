"""The keys of LoRA files: what is known, and how what is not is refused."""

import diffusers
import pytest
import torch

from diffusers_sana.models.transformers.lora_formats import convert_sana_lora
from tests import tiny
from tests.loaders.lora_files import FORMATS, plain, random_lora


DOWN, UP = torch.ones(2, 8), torch.ones(8, 2)
KOHYA = "lora_unet_transformer_blocks_0_attn1_to_q"
LAYER = {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP}
OURS = "transformer.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("name", FORMATS)
def test_every_layer_is_found(name):
    lora = random_lora(tiny.transformer(diffusers))
    state_dict, metadata = convert_sana_lora(FORMATS[name](lora))
    assert state_dict.keys() == plain(lora).keys()
    assert metadata is not None
    assert sorted(metadata["transformer.target_modules"]) == sorted(lora)


def test_guided_time_embedding():
    lora = random_lora(tiny.transformer(diffusers, guidance_embeds=True))
    state_dict, _ = convert_sana_lora(FORMATS["ComfyUI"](lora))
    assert state_dict.keys() == plain(lora).keys()


def test_ours_comes_back_as_it_is():
    state_dict = plain(random_lora(tiny.transformer(diffusers)))
    metadata = {"transformer.r": 2, "transformer.lora_alpha": 8}
    converted, fields = convert_sana_lora(state_dict, metadata)
    assert list(converted) == list(state_dict)
    assert all(converted[key] is tensor for key, tensor in state_dict.items())
    assert fields == metadata
    assert convert_sana_lora(state_dict)[1] is None


@pytest.mark.parametrize(
    ("fields", "alpha"),
    [
        ({"lora_alpha": 8}, 8),
        ({"lora_alpha": 8, "alpha_pattern": {"^transformer_blocks.0.attn1.to_q": 4}}, 4),
        ({"lora_alpha": 8, "alpha_pattern": {"to_k": 4}}, 8),
        ({"lora_alpha": 8, "use_rslora": True}, 8 * 2**0.5),
        (None, 2),
    ],
)
def test_alpha_of_peft(fields, alpha):
    name = "base_model.model.transformer_blocks.0.attn1.to_q"
    state_dict = {f"{name}.lora_A.default.weight": DOWN, f"{name}.lora_B.default.weight": UP}
    converted, metadata = convert_sana_lora(state_dict, fields)
    assert set(converted) == {f"{OURS}.lora_A.weight", f"{OURS}.lora_B.weight"}
    assert metadata["transformer.lora_alpha"] == pytest.approx(alpha)


def test_alpha_of_a_tensor_counts_for_more():
    _, metadata = convert_sana_lora({**LAYER, f"{KOHYA}.alpha": torch.tensor(6.0)}, {"lora_alpha": 8})
    assert metadata["transformer.lora_alpha"] == 6


QKV = "diffusion_model.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({}, "must hold a LoRA, but is empty"),
        ({"lycoris_blocks_0_attn_qkv.lokr_w1": DOWN}, "'lycoris_blocks_0_attn_qkv.lokr_w1' belongs to LoKr"),
        ({f"{QKV}.hada_w1_a": DOWN}, "'diffusion_model.blocks.0.attn.qkv.hada_w1_a' belongs to LoHa"),
        ({f"{QKV}.oft_R.weight": DOWN}, "belongs to OFT"),
        ({f"{KOHYA}.lora_mid.weight": DOWN}, "Tucker"),
        ({f"{QKV}.diff_b": DOWN}, "whole changes of weights"),
        ({f"{KOHYA}.weight": DOWN}, r"is no part of a LoRA. A key must end in one of \['alpha', "),
        ({"lora_te_model_layers_0_q.lora_up.weight": UP}, "'lora_te_model_layers_0_q.*' belongs to the text encoder"),
        ({"lora_unet_double_blocks_0_qkv.lora_up.weight": UP, "lora_unet_double_blocks_0_qkv.lora_down.weight": DOWN},
         "'lora_unet_double_blocks_0_qkv.*' names no layer of Sana"),
        ({f"{KOHYA}.lora_up.weight": UP}, rf"'{KOHYA}.lora_up.weight' must have a second key .*'lora_down.weight'"),
        ({f"{KOHYA}.alpha": UP}, rf"'{KOHYA}.alpha' must have a second key"),
        ({**LAYER, f"{KOHYA}.lora_up.weight": torch.ones(8, 3)}, r"must have one rank.*\[2, 8\], \[8, 3\]"),
        ({**LAYER, f"{KOHYA}.lora_A.weight": DOWN}, rf"'{KOHYA}.lora_A.weight' is what '{KOHYA}.lora_down.weight' is"),
        ({**LAYER, f"{OURS}.lora_A.weight": DOWN, f"{OURS}.lora_B.weight": UP}, r"which another key of the file is"),
        ({f"{QKV}.lora_down.weight": DOWN, f"{QKV}.lora_up.weight": UP}, r"must have 3 equal parts, but has 8 rows"),
        ({**LAYER, f"{KOHYA}.dora_scale": torch.ones(1, 8)}, r"DoRA of inputs cannot be loaded"),
    ],
)  # fmt: skip
def test_refused(state_dict, message):
    with pytest.raises(ValueError, match=message):
        convert_sana_lora(state_dict)
