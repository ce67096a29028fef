"""Prompts that are longer than the denoiser's text: the little of them that is tokenized, and what to say about it.

A tokenizer reads all of a text before it keeps the first 300 tokens, which takes seconds and hundreds of megabytes for
a megabyte of text. So a long text is cut before, and this must not change the tokens that are kept.

Byte pair encoding guarantees that: where a token of the whole text ends, the tokens before are those of the text up to
there, because nothing was ever merged across. Which ends those are only the whole text tells, but a token is no longer
than the longest of the vocabulary, K characters, so that one of any K places in a row is an end. Where the texts up to
each of them begin with the same tokens, so does the whole text.
"""

from collections.abc import Callable, Sequence
from typing import Any

from diffusers.utils import logging
from tokenizers.models import BPE
from transformers import BatchEncoding, GemmaTokenizer, PreTrainedTokenizerBase


logger = logging.get_logger(__name__)

CHARACTERS_PER_TOKEN = 8  # more than in most texts, so that the first try is enough
SHOWN = 60  # characters of what was cut off


def beginning(
    tokenizer: PreTrainedTokenizerBase, tokenize: Callable[[list[str]], Any], text: str, num_tokens: int
) -> str:
    """The text, or a shorter one that begins with it and has the same first `num_tokens` tokens.

    Texts stay whole where a tokenizer is not known to work as Gemma's, which does not split a text into words before.

    Args:
        tokenizer: of the pipeline.
        tokenize: calls it, cutting to `num_tokens`. Always with the same options, as a tokenizer keeps them from call
            to call, also between threads.
        text: to be tokenized.
        num_tokens: special tokens included.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    is_known = isinstance(tokenizer, GemmaTokenizer) and isinstance(model, BPE) and not model.dropout
    length = num_tokens * CHARACTERS_PER_TOKEN
    if not is_known or tokenizer.truncation_side != "right" or len(text) <= 2 * length:
        return text
    longest = max(map(len, tokenizer.get_vocab()))
    while 2 * length < len(text):
        inputs = tokenize([text[:end] for end in range(max(length - longest, 0) + 1, length + 1)])
        is_long_enough = inputs.input_ids.shape[1] == num_tokens and bool(inputs.attention_mask.all())
        # A run of unknown characters is one token, of any length.
        is_known = tokenizer.unk_token_id not in tokenize([text[length - 1]]).input_ids
        if is_long_enough and is_known and bool((inputs.input_ids == inputs.input_ids[:1]).all()):
            return text[:length]
        length *= 2
    return text


def warn_of_cut(name: str, texts: Sequence[str], inputs: BatchEncoding, limit: int) -> None:
    """Says once which texts the tokens do not cover to the end.

    Args:
        name: of the argument that holds the texts.
        texts: as they were before `beginning`.
        inputs: their tokens, with an `offset_mapping` if the tokenizer can tell.
        limit: `max_sequence_length`, for the message.
    """
    if "offset_mapping" not in inputs:
        return
    cut = []
    for text, ends in zip(texts, inputs["offset_mapping"][..., 1].amax(dim=1).tolist(), strict=True):
        if rest := text[ends:].strip():
            cut.append(
                f"{rest[:SHOWN]!r}" + (f" and {len(rest) - SHOWN} more characters" if len(rest) > SHOWN else "")
            )
    if cut:
        logger.warning(
            f"`{name}` is longer than {limit} tokens (`max_sequence_length`). This is left out: {'; '.join(cut[:3])}"
            + (f"; and parts of {len(cut) - 3} other texts." if len(cut) > 3 else ".")
        )
