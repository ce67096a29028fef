"""Tiny models of transformers that evaluation uses, with random weights."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
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


TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %} :"
)


def write_vqa(folder: Path, words: tuple[str, ...] = ("yes", "Yes", "no"), template: str | None = TEMPLATE) -> str:
    """A LLaVA whose vocabulary is a few words; wide, so that images and questions are told apart."""
    torch.manual_seed(0)
    names = ["<unk>", "<pad>", "</s>", "<image>", *words, "red", "cat", "dog", "the", "is", "there", "a", "?", ":"]
    model = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, additional_special_tokens=["<image>"], **special)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**WIDTHS, **VISION),
        text_config=LlamaConfig(**WIDTHS, vocab_size=len(names), num_key_value_heads=2),
        image_token_index=names.index("<image>"),
        vision_feature_layer=-1,
    )
    llava = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in llava.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15)
    llava.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
        tokenizer,
        patch_size=16,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=template,
    ).save_pretrained(folder)
    return str(folder)
