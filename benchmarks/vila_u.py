"""VILA-U for benchmarks: sizes, models with random weights, prompts, and the least that an image costs."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import random_model
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig
from diffusers_sana.models.vila_u.modeling_vila_u import VilaUForConditionalGeneration


PROMPT_TOKENS, NEGATIVE_TOKENS = 64, 48  # the system prompt alone is about 40

# Fields of `VilaUConfig` that differ from the released model. For a CPU: its grid, its codes a cell and about the
# fraction of the depth transformer in the weights that a cell reads (26 % for 24 %), but 36 M weights.
REDUCED: dict[str, Any] = {
    "text_config": {
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "codebook_size": 2048,
        "latent_channels": 64,
        "decoder_base_channels": 32,
    },
    "depth_config": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "codebook_size": 2048,
        "codebook_dim": 256,
        "backbone_hidden_size": 512,
    },
    "image_token_id": 1024,
    "image_start_token_id": 1020,
    "image_end_token_id": 1021,
    "video_start_token_id": 1022,
    "video_end_token_id": 1023,
}
# The model of 384 pixels, which only the paper has: a grid of 27 x 27 and 16 codes a cell.
LAYOUT_384: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "image_size": 384,
        "patch_size": 14,
        "num_codebooks": 16,
        "decoder_latent_size": 24,
    },
    "depth_config": {"num_codebooks": 16, "codebook_dim": 1152},
}


def deeper(sizes: dict[str, Any]) -> dict[str, Any]:
    """`sizes` with 16 codes a cell, and half the side in cells and pixels."""
    vision = sizes["vision_config"]
    side = vision.get("image_size", 256) // 2
    return sizes | {
        "vision_config": vision | {"num_codebooks": 16, "image_size": side},
        "depth_config": sizes["depth_config"] | {"num_codebooks": 16},
    }


def vila_u(config: VilaUConfig, device: str, dtype: torch.dtype) -> Any:
    """A model of `config` with random weights, made on `device`."""
    model = random_model(lambda: VilaUForConditionalGeneration(config), device, dtype)
    language_model = model.model.language_model
    # Its buffers were made on the meta device.
    language_model.rotary_emb = type(language_model.rotary_emb)(language_model.config).to(device)
    return model


def prompts(config: VilaUConfig, batch: int, device: str) -> dict[str, Tensor]:
    """Arguments of `generate` for one image each of `batch` random prompts."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int, length: int) -> Tensor:
        ids = torch.randint(3, config.image_start_token_id, (count, length), generator=generator)
        ids[:, 0], ids[:, -1] = 1, config.image_start_token_id
        return ids.to(device)

    return {"input_ids": rows(batch, PROMPT_TOKENS), "negative_input_ids": rows(1, NEGATIVE_TOKENS)}


def question(config: VilaUConfig, batch: int, device: str) -> dict[str, Tensor]:
    """Arguments of `generate` for text about a random image, the same for each row."""
    vision, generator = config.vision_config, torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.image_start_token_id, (1, PROMPT_TOKENS), generator=generator)
    placeholders = torch.full((1, vision.num_image_tokens), config.image_token_id)
    ids = torch.cat([ids[:, :NEGATIVE_TOKENS], placeholders, ids[:, NEGATIVE_TOKENS:]], 1).repeat(batch, 1)
    shape = (batch, vision.num_image_tokens, vision.num_codebooks)
    codes = torch.randint(vision.codebook_size, shape, generator=generator)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "image_codes": codes.to(device),
    }


def image_bytes(model: Any, rows: int, prompt: int) -> dict[str, int]:
    """What must be read from memory for the codes of `rows` rows of images, at the least.

    Weights do not fit into caches, so they are read for every cell: those of the language model's layers once (the
    prompt takes the place of the first cell), those of the depth transformer once for each of the D codes. The keys
    and values of all positions before a cell are read once, too. Embeddings, activations and whatever is written are
    left out. Divided by the bandwidth, this is a floor for the seconds a batch takes.

    Args:
        model: its weights count as they are stored.
        rows: prompts, twice with guidance.
        prompt: tokens of each.

    Returns:
        Bytes by part: "language_model", "depth_transformer", "projector", "kv_cache".
    """
    text, depth, vision = model.model.language_model, model.depth_transformer, model.config.vision_config
    cells, slots = vision.num_image_tokens, vision.num_codebooks
    each_slot = stored_bytes(depth.layers) + stored_bytes(depth.norm) + stored_bytes(depth.head)
    inputs = stored_bytes(depth.backbone_proj) + (slots - 1) * stored_bytes(depth.code_proj)
    config = text.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * width * text.dtype.itemsize
    # Cell c reads the prompt and the c cells before it; cell 0 comes from the prompt.
    positions_read = sum(prompt + cell for cell in range(1, cells))
    return {
        "language_model": cells * (stored_bytes(text.layers) + stored_bytes(text.norm)),
        "depth_transformer": cells * (slots * each_slot + inputs),
        "projector": (cells - 1) * stored_bytes(model.model.projector),
        "kv_cache": rows * positions_read * position,
    }


def stored_bytes(module: nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
