"""transformers' common tests of models, on a tiny VILA-U.

Run it in the unpacked source distribution of transformers, whose folder `tests` is the package `tests` here.
"""

import unittest
from typing import Any

import torch
import transformers_tests  # noqa: F401  # makes the package `tests`
from tests.test_modeling_common import ModelTesterMixin

import diffusers_sana  # noqa: F401
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig
from diffusers_sana.models.vila_u.modeling_vila_u import VilaUForConditionalGeneration, VilaUModel


CELLS, VOCABULARY, IMAGE = 16, 99, 98
BATCH, TEXT = 3, 7


# These make up their own ids or embeddings, without placeholders for the images.
TEXT_ALONE = ("test_eager_matches_sdpa_inference", "test_inputs_embeds", "test_model_rope_scaling")


class Tester:
    """What the common tests ask of a model: a configuration and inputs."""

    batch_size = BATCH
    seq_length = TEXT + CELLS
    image_size, patch_size, num_channels = 32, 8, 3
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, VOCABULARY
    encoder_seq_length = key_length = seq_length
    is_training = True

    def __init__(self, parent: unittest.TestCase, has_images: bool) -> None:
        self.parent, self.has_images = parent, has_images
        blocks = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
        self.text_config = {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **blocks,
        }
        self.vision_config = {
            **blocks,
            "image_size": 32,
            "patch_size": 8,
            "codebook_size": 64,
            "num_codebooks": 3,
            "latent_channels": 32,
            "decoder_base_channels": 32,
            "decoder_channel_multipliers": (1, 1, 1, 1),
            "decoder_num_res_blocks": 1,
        }
        self.depth_config = {
            **blocks,
            "num_codebooks": 3,
            "codebook_size": 64,
            "codebook_dim": 32,
            "backbone_hidden_size": 32,
        }

    def get_config(self) -> VilaUConfig:
        """A tiny configuration; where there are images, their placeholder has a row in the table."""
        parts = {"text_config": self.text_config, "vision_config": self.vision_config}
        marks = {"image_start_token_id": 94, "image_end_token_id": 95}
        return VilaUConfig(
            **parts, depth_config=self.depth_config, image_token_id=IMAGE if self.has_images else VOCABULARY, **marks
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[VilaUConfig, dict[str, torch.Tensor]]:
        """One image in each row, text behind it; or text alone."""
        ids = torch.randint(3, 90, (BATCH, TEXT + CELLS))
        if not self.has_images:
            return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids[:, 1 : 1 + CELLS] = IMAGE
        pixels = torch.rand(BATCH, 3, 32, 32) * 2 - 1
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        return self.get_config(), inputs


class VilaUTest(ModelTesterMixin, unittest.TestCase):
    """The common tests, without those that cannot be about this model."""

    all_model_classes = (VilaUModel, VilaUForConditionalGeneration)
    _is_composite = True
    test_resize_embeddings = False  # they move ids into a smaller table, and with them the placeholders

    def setUp(self) -> None:
        self.model_tester = Tester(self, has_images=not self._testMethodName.startswith(TEXT_ALONE))

    def _image_features_get_expected_num_hidden_states(self, model_tester: Any = None) -> int:
        return self.model_tester.vision_config["num_hidden_layers"]  # the last block is not run

    def _image_features_get_expected_num_attentions(self, model_tester: Any = None) -> int:
        return self.model_tester.vision_config["num_hidden_layers"] - 1


NOT_ABOUT_IT = {
    "test_generation_tester_mixin_inheritance": "the tests of generation are not in the source distribution",
    "test_save_load_keys_to_ignore_on_save": "the state of the codebook's moving averages exists in its training only",
    **dict.fromkeys(
        (
            "test_training_gradient_checkpointing",
            "test_training_gradient_checkpointing_use_reentrant_false",
            "test_training_gradient_checkpointing_use_reentrant_true",
        ),
        "looks at the first layer that can be checkpointed, which is in the frozen tower",
    ),
}
for test, reason in NOT_ABOUT_IT.items():
    setattr(VilaUTest, test, unittest.skip(reason)(getattr(VilaUTest, test)))
