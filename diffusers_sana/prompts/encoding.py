"""Prompts to the text features that Sana's denoiser attends to (arXiv 2410.10629, section 2.3).

The last hidden states of a decoder-only language model, which reads the prompt after an instruction to enrich it (the
"complex human instruction"). The denoiser sees the first token (BOS) and the tokens of the prompt, not those of the
instruction.

Pipelines call `encode_prompts`. Training calls `tokenize_prompts` and `encode_tokens`, which compute the same features
with gradients. The prefix, all tokens before the prompt's first one, is the same for every prompt, and the encoder is
causal: so the prefix runs once, as a batch of one, and its keys and values serve all prompts. The last token of the
instruction is a space, which the tokenizer fuses with the prompt's first word; so it does not belong to the prefix.

An empty negative prompt is encoded without the instruction, as BOS alone. BOS attends to nothing but itself, so its
features are the same in both, and masking all but the first token drops a prompt. The authors' pipeline masks the
negative prompt like the prompt instead, padding included; `share_prompt_mask` does that.

Legend: B prompts, L text tokens that the denoiser sees, C width of the language model, P tokens of the prefix,
S = L - 1 tokens after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusers_sana.checks import check_computed, check_texts
from diffusers_sana.locks import exclusive
from diffusers_sana.models.layers import scaled_adapters
from diffusers_sana.prompts.prefix_cache import hidden_states, run_after, run_prefix
from diffusers_sana.prompts.tokenization import (
    COMPLEX_HUMAN_INSTRUCTION,
    clean_captions,
    join_instruction,
    tokenize,
    warn_of_cut,
)


# What `encode_prompt` of the pipelines returns, in order.
TEXT_TENSORS = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")


def complex_human_instruction() -> str:
    """The instruction that diffusers' Sana pipelines put before a prompt."""
    return join_instruction(COMPLEX_HUMAN_INSTRUCTION)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts, or the features in their place, and how to read them, as `SanaPipeline.encode_prompt` takes them.

    The pipelines of SANA-Sprint have no negative prompts.
    """

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    num_images_per_prompt: int = 1
    clean_caption: bool = False
    max_sequence_length: int = 300
    complex_human_instruction: str | Sequence[str] | None = None
    lora_scale: float | None = None
    share_prompt_mask: bool = False

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Those among the arguments of a call, the `locals()` at its start; other names in it are left."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in arguments.items() if name in known})


def encode_prompts(
    tokenizer: Any, text_encoder: Any, prompts: Prompts, *, is_guided: bool, device: torch.device
) -> dict[str, Any]:
    """Text features of prompts and negative prompts, one row per image; the images of a prompt are neighbors.

    Args:
        tokenizer, text_encoder: of the pipeline; None where all features are given.
        prompts: texts or features.
        is_guided: whether the features of negative prompts are needed.
        device: of the result.

    Returns:
        By the names in `TEXT_TENSORS`: features `[B, L, width]` and mask `[B, L]`, and those of the negative prompts
        or None twice.
    """
    instruction = join_instruction(prompts.complex_human_instruction)

    def encode(
        name: str, texts: Any, instruction: str, num_tokens: int, keep_padding: bool = False
    ) -> tuple[Tensor, Tensor]:
        texts = [texts] if isinstance(texts, str) else texts
        check_texts(name, texts, texts)
        return encode_captions(
            tokenizer,
            text_encoder,
            clean_captions(texts, prompts.clean_caption),
            instruction,
            max_sequence_length=num_tokens,
            device=device,
            name=name,
            keep_padding=keep_padding,
        )

    needs_negative = is_guided and prompts.negative_prompt_embeds is None
    if needs_negative and text_encoder is None:
        raise ValueError(
            "`negative_prompt_embeds` must be given, because this pipeline was made without a text encoder; or set"
            " `guidance_scale` to 1, without a `guider`."
        )
    if prompts.share_prompt_mask and is_guided and not needs_negative:
        raise ValueError(
            "`share_prompt_mask` needs the negative prompt as a text, but `negative_prompt_embeds` are given. Leave"
            " one out, or give the mask as `negative_prompt_attention_mask`."
        )
    with exclusive(text_encoder), scaled_adapters(text_encoder, prompts.lora_scale):
        embeds, mask = prompts.prompt_embeds, prompts.prompt_attention_mask
        if embeds is None:
            embeds, mask = encode("prompt", prompts.prompt, instruction, prompts.max_sequence_length)
        negative, negative_mask = prompts.negative_prompt_embeds, prompts.negative_prompt_attention_mask
        if needs_negative:
            text, shares_mask = prompts.negative_prompt or "", prompts.share_prompt_mask
            num_tokens = embeds.shape[1] if shares_mask else prompts.max_sequence_length
            negative, negative_mask = encode("negative_prompt", text, "", num_tokens, keep_padding=shares_mask)
            if len(negative) == 1:
                negative = negative.expand(len(embeds), -1, -1)
                negative_mask = negative_mask.expand(len(embeds), -1)
            negative_mask = mask if shares_mask else negative_mask

    dtype = embeds.dtype if text_encoder is None else text_encoder.dtype

    def per_image(embeds: Any, mask: Any) -> tuple[Tensor, Tensor]:
        count = prompts.num_images_per_prompt
        embeds = embeds.to(device, dtype).repeat_interleave(count, dim=0)
        return embeds, mask.to(device).repeat_interleave(count, dim=0)

    halves = [*per_image(embeds, mask), *(per_image(negative, negative_mask) if is_guided else (None, None))]
    return dict(zip(TEXT_TENSORS, halves, strict=True))


def encode_captions(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    captions: Sequence[str],
    instruction: str = "",
    *,
    max_sequence_length: int,
    device: torch.device,
    name: str = "prompt",
    keep_padding: bool = False,
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
        keep_padding: give what the language model makes of the padding token beyond the caption, in place of zeros.

    Returns:
        Features `[B, L, C]` in the dtype of the model and their mask `[B, L]`, 1 at tokens of the caption.
    """
    texts = [instruction + caption for caption in captions]
    prefix, inputs = tokenize(tokenizer, texts, instruction, max_sequence_length)
    input_ids, mask = inputs.input_ids, inputs.attention_mask
    warn_of_cut(name, texts, inputs, max_sequence_length)
    start = max(len(prefix), 1)
    if keep_padding:
        missing = start - 1 + max_sequence_length - mask.shape[1]
        input_ids = F.pad(input_ids, (0, missing), value=tokenizer.pad_token_id)
        mask = F.pad(mask, (0, missing))
    embeds = hidden_states(text_encoder, input_ids, mask, prefix or input_ids[0, :1].tolist(), device)
    mask = mask[:, [0, *range(start, mask.shape[1])]].to(embeds.device)
    if not keep_padding:
        embeds = embeds.masked_fill(mask.unsqueeze(-1) == 0, 0)
    check_computed("text_encoder", "features", embeds, embeds.dtype)
    return pad_text(embeds, mask, max_sequence_length)


def pad_text(embeds: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Lengthens `[B, L, C]` features and their `[B, L]` mask to `length` tokens, with zeros."""
    missing = length - embeds.shape[1]
    return F.pad(embeds, (0, 0, 0, missing)), F.pad(mask, (0, missing))


@dataclass
class PromptTokens:
    """Tokenized prompts.

    Attributes:
        prefix_ids: `[1, P]`, what all prompts begin with.
        input_ids: `[B, S]`, what follows, padded on the right to the longest.
        attention_mask: `[B, S]`, 1 for tokens, 0 for padding.
    """

    prefix_ids: Tensor
    input_ids: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device | str) -> "PromptTokens":
        """The same on another device."""
        return PromptTokens(self.prefix_ids.to(device), self.input_ids.to(device), self.attention_mask.to(device))


def tokenize_prompts(
    tokenizer: Any, prompts: list[str], max_sequence_length: int = 300, instruction: str = ""
) -> PromptTokens:
    """Lower-case, strip and tokenize prompts after `instruction`; longer ones are cut as the pipeline cuts them.

    Raises a ValueError when the tokenizer merges the instruction's tokens differently before some prompt.
    """
    if isinstance(prompts, str):
        raise TypeError("`prompts` must be a list of str, got a str. Put it into a list.")
    texts = [instruction + caption for caption in clean_captions(prompts)]
    shared, tokens = tokenize(tokenizer, texts, instruction, max_sequence_length)
    prefix = shared or tokens.input_ids[0, :1].tolist()
    prefix_ids = torch.tensor([prefix])
    for prompt, ids in zip(prompts, tokens.input_ids, strict=True):
        if not torch.equal(ids[: len(prefix)], prefix_ids[0]):
            raise ValueError(
                f"`instruction` must be tokenized the same before every prompt, got other tokens before {prompt!r}. "
                "Train the tokenizer on the instruction, or use no instruction."
            )
    return PromptTokens(prefix_ids, tokens.input_ids[:, len(prefix) :], tokens.attention_mask[:, len(prefix) :])


def encode_tokens(text_encoder: PreTrainedModel, tokens: PromptTokens) -> tuple[Tensor, Tensor]:
    """Features `[B, L, C]` and their mask `[B, L]`, equal to those of `encode_captions` where the mask is 1."""
    first_mask = tokens.attention_mask.new_ones(len(tokens.input_ids), 1)
    prefix_mask = torch.ones_like(tokens.prefix_ids)
    prefix = run_prefix(text_encoder, tokens.prefix_ids, prefix_mask)
    mask = torch.cat([prefix_mask.expand(len(first_mask), -1), tokens.attention_mask], dim=1)
    states = run_after(text_encoder, prefix, tokens.input_ids, mask)
    return states, torch.cat([first_mask, tokens.attention_mask], dim=1)


def drop_prompts(attention_mask: Tensor, dropped: Tensor) -> Tensor:
    """Mask `[B, L]` in which the `dropped` ones of `[B]` are empty prompts: only the first token is left."""
    return torch.cat([attention_mask[:, :1], attention_mask[:, 1:] * ~dropped[:, None]], dim=1)
