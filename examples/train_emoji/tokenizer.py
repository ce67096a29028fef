"""A small tokenizer in Gemma's manner, made from the captions it will read.

Byte-pair encoding over words that carry the space before them as `▁`, bytes for what it does not know, BOS in front,
no EOS: the properties on which Sana's handling of the complex human instruction rests.
"""

import json
import random
import tempfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer, PreTrainedTokenizerBase

from .data import COLORS, POSITIONS, STYLES, EmojiArt, with_article


SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]  # Gemma's first ids


def corpus(art: EmojiArt, instruction: str) -> list[str]:
    """Every word that training can show, in context, each often enough to become one token."""
    rng = random.Random(0)
    texts = [instruction] * 16
    for label in art.labels * 4:
        color, position, style = rng.choice(list(COLORS)), rng.choice(list(POSITIONS)), rng.choice(STYLES)
        texts.append(f"{with_article(label)} and {with_article(label, style)}{position}")
        texts.append(f" on {with_article(color)} background, {style} style")
    return texts


def make_tokenizer(art: EmojiArt, instruction: str, vocab_size: int = 1536) -> PreTrainedTokenizerBase:
    """A `GemmaTokenizer` of at most `vocab_size` tokens; `instruction` is the complex human instruction."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Only for learning: no merge then crosses a word or a mark, so that `GemmaTokenizer`, which does not split at
    # all, finds the same tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("▁"), "merged_with_next"), pre_tokenizers.Split(Regex(r"[,:.\n]"), "isolated")]
    )
    tokenizer.train_from_iterator(
        corpus(art, instruction),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS + [f"<0x{byte:02X}>" for byte in range(256)],
            show_progress=False,
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        tokenizer.save(str(file))
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
    return GemmaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=True,
        add_eos_token=False,
        padding_side="left",  # as on the Hub; the pipeline pads on the right
        model_max_length=2048,
    )
