"""Initializes VILA-U's vision tower from transformers' SigLIP, which has the same blocks under longer names."""

import re
from typing import Any

from transformers import SiglipConfig, SiglipModel

from diffusers_sana.models.vila_u.configuration_vila_u import VilaUVisionConfig
from diffusers_sana.models.vila_u.vision_vila_u import VilaUVisionModel


# Fields that SigLIP's configs have too; in the tower's config those of the text encoder have the prefix `text_`.
_BLOCK_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VISION_FIELDS = (*_BLOCK_FIELDS, "image_size", "patch_size", "hidden_act", "layer_norm_eps")
TEXT_FIELDS = (*_BLOCK_FIELDS, "vocab_size", "max_position_embeddings")


def tower_config_like(siglip: SiglipConfig) -> VilaUVisionConfig:
    """The config of a tower for all weights of a SigLIP, with semantic head, text tower and the default codebook.

    Raises:
        StrictDataclassClassValidationError: the decoder has no layout for these patches (it upsamples by 16).
    """
    text: Any = siglip.text_config  # its fields may be None for mypy, but not after initialization
    vision: Any = siglip.vision_config
    return VilaUVisionConfig(
        **{name: getattr(vision, name) for name in VISION_FIELDS},
        **{f"text_{name}": getattr(text, name) for name in TEXT_FIELDS},
        # If patches are not 16 pixels, the grid is resized for the decoder.
        decoder_latent_size=None if vision.patch_size == 16 else vision.image_size // 16,
        use_semantic_head=True,
        use_text_tower=True,
    )


def tower_name(name: str, num_layers: int) -> str:
    """Name in the tower of a weight of a SiglipModel whose image encoder has `num_layers` blocks."""
    name = name.replace(".encoder.layers.", ".layers.")
    if name.startswith("vision_model."):
        name = name.removeprefix("vision_model.")
        name = name.replace(f"layers.{num_layers - 1}.", "semantic_head.layer.")
        name = re.sub(r"^(post_layernorm|head)\.", r"semantic_head.\1.", name)
    return name


def load_siglip(tower: VilaUVisionModel, siglip: SiglipModel) -> VilaUVisionModel:
    """Copies the weights of `siglip` into `tower` and returns it; quantizer and decoder are unchanged.

    Raises:
        ValueError: the tower lacks a part of SigLIP, or a size differs.
    """
    config: Any = siglip.config
    layers = config.vision_config.num_hidden_layers
    weights = {tower_name(name, layers): value for name, value in siglip.state_dict().items()}
    own = tower.state_dict()
    mismatched = sorted(name for name, value in weights.items() if name not in own or own[name].shape != value.shape)
    if mismatched:
        raise ValueError(
            f"`tower` must have the layout of `siglip`, but does not match in {', '.join(mismatched[:5])}"
            f"{' ...' if len(mismatched) > 5 else ''}. Build it with `tower_config_like(siglip.config)`."
        )
    tower.load_state_dict(weights, strict=False)
    return tower
