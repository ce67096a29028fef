"""A VILA-U small enough for unit tests, with every part: 16 cells of 3 codes for 32 x 32 pixels."""

from functools import lru_cache
from typing import Any

import torch

from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig, VilaUDepthConfig, VilaUVisionConfig


VOCABULARY = 128
IMAGE, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = 128, 124, 125, 126, 127
PAD, BOS, EOS = 0, 1, 2
CELLS, DEPTH, CODES, WIDTH = 16, 3, 64, 64
IMAGE_TOKENS = [IMAGE] * CELLS

# Prompts for images, of different lengths; a negative prompt; and arguments of `generate` for greedy images.
PROMPTS = [[BOS, 5, 6, IMAGE_START], [BOS, 7, 8, 9, 10, 11, IMAGE_START]]
NEGATIVE = [BOS, 3, IMAGE_START]
GREEDY = {"generation_mode": "image", "do_sample": False}


def blocks(width: int, layers: int) -> dict[str, int]:
    """Config fields of a stack of transformer blocks."""
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }


def tiny_vision_config(**overrides: Any) -> VilaUVisionConfig:
    fields = {
        **blocks(32, 3),
        "image_size": 32,
        "patch_size": 8,
        "codebook_size": CODES,
        "num_codebooks": DEPTH,
        "latent_channels": 32,
        "decoder_base_channels": 32,
        "decoder_channel_multipliers": (1, 1, 1, 1),
        "decoder_num_res_blocks": 1,
        "text_vocab_size": VOCABULARY,
        **{f"text_{name}": value for name, value in blocks(32, 2).items()},
        "text_max_position_embeddings": 16,
    }
    return VilaUVisionConfig(**(fields | overrides))


def tiny_depth_config(**overrides: Any) -> VilaUDepthConfig:
    fields = {
        **blocks(64, 2),
        "num_codebooks": DEPTH,
        "codebook_size": CODES,
        "codebook_dim": 32,
        "backbone_hidden_size": WIDTH,
    }
    return VilaUDepthConfig(**(fields | overrides))


def tiny_text_config(**overrides: Any) -> dict[str, Any]:
    fields = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        **blocks(WIDTH, 2),
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return fields | overrides


def tiny_config(**overrides: Any) -> VilaUConfig:
    fields = {
        "text_config": tiny_text_config(),
        "vision_config": tiny_vision_config(),
        "depth_config": tiny_depth_config(),
        "image_token_id": IMAGE,
        "image_start_token_id": IMAGE_START,
        "image_end_token_id": IMAGE_END,
        "video_start_token_id": VIDEO_START,
        "video_end_token_id": VIDEO_END,
        "num_video_frames": 2,
    }
    return VilaUConfig(**(fields | overrides))


def tiny_model(seed: int = 0, **overrides: Any) -> Any:
    """A fresh `VilaUForConditionalGeneration` in eval mode; wider weights than in training, so that outputs differ."""
    from diffusers_sana.models.vila_u.modeling_vila_u import VilaUForConditionalGeneration

    torch.manual_seed(seed)
    model = VilaUForConditionalGeneration(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "vision_tower" not in name:
                parameter.mul_(5)
    return model


@lru_cache
def shared_model() -> Any:
    """One tiny model for all tests that do not change it."""
    return tiny_model()


def ids(*rows: list[int], left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask` of rows of token ids, padded to the longest."""
    longest = max(map(len, rows))

    def padded(row: list[int], filler: int) -> list[int]:
        pads = [filler] * (longest - len(row))
        return pads + row if left else row + pads

    masks = [padded([1] * len(row), 0) for row in rows]
    return torch.tensor([padded(row, PAD) for row in rows]), torch.tensor(masks)


def random_codes(count: int, seed: int = 0) -> torch.Tensor:
    """Codes `[count, CELLS, DEPTH]` of images."""
    return torch.randint(CODES, (count, CELLS, DEPTH), generator=torch.Generator().manual_seed(seed))


def batch(*rows: list[int]) -> dict[str, torch.Tensor]:
    """Arguments of `forward`, with codes for the images of which the rows have placeholders."""
    input_ids, mask = ids(*rows)
    count = int((input_ids == IMAGE).sum()) // CELLS
    images = {"image_codes": random_codes(count)} if count else {}
    return {"input_ids": input_ids, "attention_mask": mask, **images}


def prompt(*rows: list[int], negative: list[int] | None = NEGATIVE) -> dict[str, torch.Tensor]:
    """Arguments of `generate` for images."""
    input_ids, mask = ids(*rows)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if negative is not None:
        inputs["negative_input_ids"] = torch.tensor([negative])
    return inputs
