"""Configurations: the released model by default, JSON, and what must fit together."""

import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import LlamaConfig

from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig, VilaUDepthConfig, VilaUVisionConfig
from tests.models.vila_u.tiny import tiny_config, tiny_depth_config, tiny_vision_config


def test_defaults_are_the_released_model():
    config = VilaUConfig()
    assert (config.vision_config.grid_size, config.vision_config.num_image_tokens) == (16, 256)
    assert config.get_text_config(decoder=True) is config.text_config
    assert (config.text_config.vocab_size, config.text_config.num_hidden_layers) == (32004, 32)
    assert config.depth_config.hidden_size // config.depth_config.num_attention_heads == 64
    assert not config.tie_word_embeddings


def test_the_384_pixel_model():
    vision = VilaUVisionConfig(
        hidden_size=1152, num_hidden_layers=27, image_size=384, patch_size=14, num_codebooks=16, decoder_latent_size=24
    )
    assert (vision.grid_size, vision.num_image_tokens) == (27, 729)
    config = VilaUConfig(vision_config=vision, depth_config={"num_codebooks": 16, "codebook_dim": 1152})
    assert config.vision_config is vision


def test_json_and_folder(tmp_path):
    config = tiny_config(visual_loss_weight=0.5)
    read = VilaUConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert read.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    read = VilaUConfig.from_pretrained(tmp_path)
    assert read.to_dict() == config.to_dict()
    assert isinstance(read.text_config, LlamaConfig)
    # Each part can be read out of the folder of the whole.
    assert VilaUVisionConfig.from_pretrained(tmp_path).to_dict() == config.vision_config.to_dict()
    assert VilaUDepthConfig.from_pretrained(tmp_path).to_dict() == config.depth_config.to_dict()


def test_another_language_model():
    text = {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert tiny_config(text_config=text).text_config.model_type == "qwen2"


VISION_ERRORS = [
    ({"num_attention_heads": 5}, "`hidden_size` must be a multiple of `num_attention_heads`, got 32 with 5"),
    ({"num_hidden_layers": 1}, "`num_hidden_layers` must be at least 2, got 1"),
    ({"num_codebooks": 0}, "`num_codebooks` must be at least 1, got 0"),
    ({"image_size": 4}, "`grid_size` must be at least 1, got 0"),
    ({"decoder_channel_multipliers": (1, 1, 1)}, "enlarges 4 times, so `patch_size` must be 4"),
    ({"image_size": 36}, "divide `image_size`, got 8 and 36"),
    (
        {"patch_size": 7, "decoder_latent_size": 5},
        "times 8 .* must be `image_size` = 32, got a `decoder_latent_size` of 5",
    ),
    (
        {"decoder_base_channels": 48},
        re.escape("multiple of `decoder_norm_groups` = 32, got [48, 48, 48, 48]"),
    ),
]


@pytest.mark.parametrize(("fields", "message"), VISION_ERRORS)
def test_vision_errors(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_vision_config(**fields)


def test_a_latent_size_makes_up_for_the_patch_size():
    assert tiny_vision_config(patch_size=7, decoder_latent_size=4).grid_size == 4


@pytest.mark.parametrize("name", ["num_codebooks", "codebook_size", "codebook_dim", "backbone_hidden_size"])
def test_the_depth_transformer_must_fit(name):
    with pytest.raises(StrictDataclassClassValidationError, match=rf"`depth_config.{name}` must equal `\w+_config"):
        tiny_config(depth_config=tiny_depth_config(**{name: 7}))


def test_other_errors():
    with pytest.raises(StrictDataclassClassValidationError, match="with 7 heads"):
        tiny_depth_config(num_attention_heads=7)
    with pytest.raises(StrictDataclassClassValidationError, match="`num_video_frames` must be at least 1"):
        tiny_config(num_video_frames=0)
    with pytest.raises(StrictDataclassFieldValidationError, match="quantizer_dtype"):
        tiny_vision_config(quantizer_dtype="float64")
