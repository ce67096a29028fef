"""A small tokenizer in LLaMA's manner, made from the chats it will read.

Byte-pair encoding over words that carry the space before them as `▁`, bytes for what it does not know, and VILA-U's
five tokens of media behind the vocabulary.
"""

import json
import random

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer

from diffusers_sana.models.vila_u.prompts_vila_u import (
    ASSISTANT,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    SYSTEM_PROMPT,
    USER,
    VIDEO_END,
    VIDEO_START,
)

from .scenes import COLORS, POSITIONS, STYLES, EmojiArt, with_article


SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]  # LLaMA's first ids
MEDIA_TOKENS = [IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END, IMAGE]  # the last has no row in the model's tables


def corpus(art: EmojiArt, questions: list[str]) -> list[str]:
    """Every word that training can show, in context, each often enough to become one token."""
    rng = random.Random(0)
    texts = [f"{SYSTEM_PROMPT} {USER} {question} {ASSISTANT}" for question in questions] * 16
    for label in art.labels * 4:
        color, position, style = rng.choice(list(COLORS)), rng.choice(list(POSITIONS)), rng.choice(STYLES)
        texts.append(f" {with_article(label)} and {with_article(label, style)}{position}")
        texts.append(f" on {with_article(color)} background, {style} style")
    return texts


def make_tokenizer(art: EmojiArt, questions: list[str], vocab_size: int = 1276) -> LlamaTokenizer:
    """A `LlamaTokenizer` of at most `vocab_size` tokens before the media tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Only for learning: no merge then crosses a word or a mark, so that the Llama tokenizer, which does not split at
    # all, finds the same tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("▁"), "merged_with_next"), pre_tokenizers.Split(Regex(r"[,:.?\n]"), "isolated")]
    )
    special = SPECIAL_TOKENS + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus(art, questions), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    result = LlamaTokenizer(vocab=model["vocab"], merges=merges, pad_token="<unk>", legacy=False)
    result.model_max_length = 1024
    result.add_special_tokens({"additional_special_tokens": MEDIA_TOKENS})
    return result
