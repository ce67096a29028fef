"""SigLIP's weights in VILA-U's tower: the same features, and errors where they do not fit."""

import pytest
import torch
from transformers import SiglipConfig, SiglipModel

from diffusers_sana.loaders.vila_u.siglip import load_siglip, tower_config_like
from diffusers_sana.models.vila_u.vision_vila_u import VilaUVisionModel
from tests.numerics import assert_close_fp32


def tiny_siglip(patch=16, layers=3):
    torch.manual_seed(0)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    text = shared | {"vocab_size": 64, "max_position_embeddings": 16, "projection_size": 32}
    vision = shared | {"image_size": 32, "patch_size": patch}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()


@pytest.mark.parametrize("patch", [16, 14])
def test_the_tower_computes_what_siglip_does(patch):
    siglip = tiny_siglip(patch)
    tower = load_siglip(VilaUVisionModel(tower_config_like(siglip.config)), siglip).eval()
    images, ids = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randint(64, (2, 16))
    theirs = siglip(input_ids=ids, pixel_values=images, return_loss=True)
    pooled = tower.semantic_head(tower.encode(images).flatten(1, 2))
    assert_close_fp32(pooled, siglip.vision_model(images).pooler_output)
    assert_close_fp32(tower.contrastive_loss(pooled, tower.get_text_features(ids)), theirs.loss)
    assert tower(images).reconstruction.shape == images.shape


def test_a_tower_of_another_layout_is_refused():
    siglip = tiny_siglip()
    config = tower_config_like(siglip.config)
    config.use_text_tower = False
    with pytest.raises(ValueError, match=r"`tower` must have the layout of `siglip`.*logit_bias"):
        load_siglip(VilaUVisionModel(config), siglip)
    with pytest.raises(ValueError, match="does not match in"):
        load_siglip(VilaUVisionModel(tower_config_like(tiny_siglip(layers=2).config)), siglip)
