"""Long prompts: few characters are tokenized, the tokens are those of all, and what is left out is said."""

import random
import string

import pytest
from transformers import AutoTokenizer, GemmaTokenizer

from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.prompts.tokenization import beginning
from tests import tiny


NUM_TOKENS = 24


def bundled():
    return AutoTokenizer.from_pretrained(SANA_EMOJI, subfolder="tokenizer")


def random_merges():
    """A vocabulary in which the end of a run of letters decides about tokens far before it."""
    rng = random.Random(0)
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "▁": 5, "a": 6, "b": 7, "c": 8}
    merges = []
    while len(merges) < 120:
        left, right = rng.choice(list(vocab)[5:]), rng.choice(list(vocab)[5:])
        if left + right not in vocab and len(left + right) <= 9:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


TOKENIZERS = {"bundled": bundled, "characters": tiny.tokenizer, "merges": random_merges}
ALPHABETS = {
    "words": ["a fox ", "on ", "the ", "moon, ", "strawberry ", "🦊", "狐 "],
    "three letters": list("abc"),
    "three letters and spaces": list("abc "),
    "one letter": ["a"],
    "spaces": [" ", " ", " ", "x"],
    "printable": list(string.printable),
    "unknown": list("éü"),
    "special tokens": ["<bos>", "<eos>", "<bo", "s>", "a"],
}


class Reader:
    """Calls a tokenizer and counts the characters that it reads."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __call__(self, texts):
        self.characters += sum(map(len, texts))
        options = {"padding": "longest", "padding_side": "right", "max_length": NUM_TOKENS, "truncation": True}
        return self.tokenizer(texts, return_tensors="pt", **options)


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_tokens_are_those_of_the_whole_text(tokenizer, alphabet):
    tokenizer, rng = TOKENIZERS[tokenizer](), random.Random(1)
    for size in (30, 400, 5000):
        text = "".join(rng.choice(ALPHABETS[alphabet]) for _ in range(size))
        cut = beginning(tokenizer, Reader(tokenizer), text, NUM_TOKENS)
        assert text.startswith(cut)
        whole = tokenizer(text, max_length=NUM_TOKENS, truncation=True).input_ids
        assert tokenizer(cut, max_length=NUM_TOKENS, truncation=True).input_ids == whole


def test_reads_a_small_part_of_a_large_text():
    reader = Reader(bundled())
    text = "a fox on the moon, " * 50_000
    assert len(beginning(reader.tokenizer, reader, text, NUM_TOKENS)) < 1000
    assert reader.characters < 20_000


def test_reads_all_where_nothing_is_certain():
    """Unknown characters in a row are one token, which no number of characters fills."""
    text = "éü" * 500
    assert beginning(tiny.tokenizer(), Reader(tiny.tokenizer()), text, NUM_TOKENS) == text


def test_other_tokenizers_read_all():
    text = "a fox " * 1000

    class Other:
        backend_tokenizer = tiny.tokenizer().backend_tokenizer

    assert beginning(Other(), Reader(None), text, NUM_TOKENS) is text
