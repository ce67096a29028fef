"""Tiny models of transformers that evaluation uses, with random weights."""

import string
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizerFast,
    CLIPVisionConfig,
)


WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"vocab_size": 80, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
VISION = {"image_size": 32, "patch_size": 16}


def tokenizer() -> CLIPTokenizerFast:
    """One token a letter; none of the texts begins with token 0, which OWL-ViT takes for no text."""
    tokens = [
        "!",
        "<|startoftext|>",
        "<|endoftext|>",
        *string.ascii_lowercase,
        *(c + "</w>" for c in string.ascii_lowercase),
    ]
    return CLIPTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def write_clip(folder: Path) -> str:
    """A CLIP with its processors; returns the folder."""
    torch.manual_seed(0)
    text, vision = CLIPTextConfig(**WIDTHS, **TEXT), CLIPVisionConfig(**WIDTHS, **VISION)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return str(folder)
