"""Prompts to the text features that Sana's denoiser attends to (arXiv 2410.10629, section 2.3).

The last hidden states of a decoder-only language model, which reads the prompt after an instruction to enrich it (the
"complex human instruction"). The denoiser sees the first token and the tokens of the prompt, not those of the
instruction.

Legend: B prompts, L text tokens, C width of the language model.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline as UpstreamSanaPipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusers_sana._compat import private, upstream_instruction
from diffusers_sana.checks import check_computed, check_texts
from diffusers_sana.prompts.prefix_cache import hidden_states
from diffusers_sana.prompts.tokenization import beginning, warn_of_cut


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


def encode_captions(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    captions: Sequence[str],
    instruction: str = "",
    *,
    max_sequence_length: int,
    device: torch.device,
    name: str = "prompt",
) -> tuple[Tensor, Tensor]:
    """Runs the language model. Says what of a caption is cut off.

    Args:
        tokenizer: must begin every text with a special token.
        text_encoder: model without a head, such as `Gemma2Model`.
        captions: B texts; the denoiser sees at most `max_sequence_length - 1` tokens of each.
        instruction: put before each caption.
        max_sequence_length: L of the result.
        device: where the language model runs.
        name: of the argument that has the captions, for warnings.

    Returns:
        Features `[B, L, C]` in the dtype of the model, zero beyond the caption, and their mask `[B, L]`, 1 at tokens.
    """
    # Where instruction and caption meet, the tokenizer joins the last space of the one with the first word of the
    # other; so the last token of the instruction alone is no part of what is before the caption.
    prefix = tokenizer.encode(instruction)[:-1] if instruction else []
    skipped = max(len(prefix) - 1, 0)
    num_tokens = max_sequence_length + skipped
    tokenize = partial(
        tokenizer,
        padding="longest",  # the model is causal: padding to the right cannot change a token
        padding_side="right",
        max_length=num_tokens,
        truncation=True,
        return_tensors="pt",
        return_offsets_mapping=tokenizer.is_fast,
    )
    texts = [instruction + caption for caption in captions]
    inputs = tokenize([beginning(tokenizer, tokenize, text, num_tokens) for text in texts])
    mask = inputs.attention_mask
    if not bool(mask.any(dim=-1).all()):
        raise ValueError(
            "`tokenizer` gives no token for an empty prompt; it must put a beginning-of-sequence token before each"
            " text, as Gemma's does."
        )
    warn_of_cut(name, texts, inputs, max_sequence_length)
    first = inputs.input_ids[0, :1].tolist()
    embeds = hidden_states(text_encoder, inputs.input_ids, mask, prefix or first, device)
    mask = mask[:, [0, *range(1 + skipped, mask.shape[1])]].to(embeds.device)
    embeds = embeds.masked_fill(mask.unsqueeze(-1) == 0, 0)
    check_computed("text_encoder", "features", embeds, embeds.dtype)
    return pad_text(embeds, mask, max_sequence_length)


def pad_text(embeds: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Lengthens `[B, L, C]` features and their `[B, L]` mask to `length` tokens, with zeros."""
    missing = length - embeds.shape[1]
    return F.pad(embeds, (0, 0, 0, missing)), F.pad(mask, (0, missing))
