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

from .scenes import UNCOUNTED, Scenes


SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]  # Gemma's first ids


def texts(objects: list[str]) -> list[str]:
    """Captions with every word that training can show, also in the plural, each often enough to become one token."""
    rng = random.Random(0)
    of_each = [Scenes([word], seed, {kind: 1}) for word in objects for seed, kind in enumerate(("object", "position"))]
    of_each += [Scenes([word], 2, {"count": 1}) for word in objects if word not in UNCOUNTED]
    pairs = Scenes(objects, kinds={"pair": 1, "small": 1})
    return [source.sample(None).caption(rng) for source in [*of_each * 4, *[pairs] * 2000]]


def make_tokenizer(texts: list[str], instruction: str, vocab_size: int = 1536) -> PreTrainedTokenizerBase:
    """A `GemmaTokenizer` of at most `vocab_size` tokens, which merges what is frequent.

    Args:
        texts: what it will read.
        instruction: the complex human instruction, before each of them.
        vocab_size: the largest number of tokens.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Only for learning: no merge then crosses a word or a mark, so that `GemmaTokenizer`, which does not split at
    # all, finds the same tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("▁"), "merged_with_next"), pre_tokenizers.Split(Regex(r"[,:.\n]"), "isolated")]
    )
    tokenizer.train_from_iterator(
        [instruction] * 16 + texts,
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
