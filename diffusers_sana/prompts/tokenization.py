"""Prompts to tokens: cleaning, the instruction before them, and how prompts that are too long are cut.

A tokenizer reads all of a text before it keeps the first 300 tokens, which takes seconds and hundreds of megabytes for
a megabyte of text. So a long text is cut first, and this must not change the tokens that are kept.

Byte pair encoding guarantees that: where a token of the whole text ends, the tokens before it are those of the text up
to there, because no merge crosses it. Only the whole text tells where tokens end. But no token is longer than the
longest one of the vocabulary, K characters, so one of any K consecutive positions is an end. If the texts up to each
of them begin with the same tokens, so does the whole text.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from diffusers.pipelines.sana.pipeline_sana import SanaPipeline as UpstreamSanaPipeline
from diffusers.utils import logging
from tokenizers.models import BPE
from transformers import BatchEncoding, GemmaTokenizer, PreTrainedTokenizerBase

from diffusers_sana._compat import private, upstream_instruction
from diffusers_sana.checks import check_texts
from diffusers_sana.locks import exclusive


logger = logging.get_logger(__name__)

CHARACTERS_PER_TOKEN = 8  # more than in most texts, so that the first try is enough
SHOWN = 60  # characters of what was cut off

# The lines of the default instruction, as the installed diffusers has them.
COMPLEX_HUMAN_INSTRUCTION: tuple[str, ...] = upstream_instruction()


def clean_captions(captions: Sequence[str], clean_caption: bool = False) -> list[str]:
    """Lower case without outer spaces; with `clean_caption` what diffusers' pipeline makes of web captions.

    `clean_caption` needs beautifulsoup4 and ftfy; without them diffusers warns and leaves the cleaning out.
    """
    if not clean_caption:
        return [caption.lower().strip() for caption in captions]
    # The method reads class attributes only, so an empty instance serves.
    cleaner = object.__new__(UpstreamSanaPipeline)
    return private(cleaner, "_text_preprocessing")(list(captions), clean_caption=True)


def join_instruction(complex_human_instruction: str | Sequence[str] | None) -> str:
    """The instruction as one text, from its lines or from the text itself; empty for none."""
    if not complex_human_instruction:
        return ""
    given: Any = complex_human_instruction
    lines = given if isinstance(given, list | tuple) else [given]
    check_texts("complex_human_instruction", lines, given)
    return "\n".join(lines)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], instruction: str, max_sequence_length: int
) -> tuple[list[int], BatchEncoding]:
    """The tokens before the captions, which all texts share, and those of the texts, padded on the right.

    Args:
        tokenizer: must begin every text with a special token.
        texts: captions after the instruction.
        instruction: may be empty; then nothing is shared.
        max_sequence_length: tokens per caption, the leading special token included.

    Returns:
        P tokens, and `input_ids` and `attention_mask` `[B, L]` on the CPU; every row should begin with the P tokens.

    Raises:
        ValueError: an empty text has no token.
    """
    # Where instruction and caption meet, the tokenizer joins the last space of the one with the first word of the
    # other; so the last token of the instruction alone is no part of what is before the caption.
    with exclusive(tokenizer):  # it keeps the length and padding that it was called with
        prefix = tokenizer.encode(instruction)[:-1] if instruction else []
        inputs = _padded(tokenizer, texts, max_sequence_length + max(len(prefix) - 1, 0))
    if not bool(inputs.attention_mask.any(dim=-1).all()):
        raise ValueError(
            "`tokenizer` gives no token for an empty prompt; it must put a beginning-of-sequence token before each"
            " text, as Gemma's does."
        )
    return prefix, inputs


def _padded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], num_tokens: int) -> BatchEncoding:
    call = partial(
        tokenizer,
        padding="longest",  # the model is causal: padding to the right cannot change a token
        padding_side="right",
        max_length=num_tokens,
        truncation=True,
        return_tensors="pt",
        return_offsets_mapping=tokenizer.is_fast,
    )
    return call([beginning(tokenizer, call, text, num_tokens) for text in texts])


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
