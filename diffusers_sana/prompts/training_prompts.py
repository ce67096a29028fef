"""The text vectors that condition Sana, computed in training exactly as the pipeline computes them, but cheaper.

Legend: B batch, P prefix tokens, S tokens after the prefix, L = 1 + S conditioning vectors, D text width.

Before the prompt the pipeline puts a long "complex human instruction". The transformer is given the vector of the
first token (BOS) and those from the instruction's last token on: that token is a space, which the tokenizer fuses with
the prompt's first word. All tokens before it, the prefix, are the same for every prompt and the encoder is causal:
so the prefix runs once, as a batch of one, and its keys and values serve all prompts. Gradients flow through them.

An empty negative prompt is encoded without the instruction as BOS alone. BOS attends to nothing but itself, so its
vector is the same in both; a prompt is dropped by masking all but the first vector.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from diffusers_sana.prompts.prefix_cache import run_after, run_prefix
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION, clean_captions, join_instruction, tokenize


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


def complex_human_instruction() -> str:
    """The instruction that diffusers' Sana pipelines put before a prompt."""
    return join_instruction(COMPLEX_HUMAN_INSTRUCTION)


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
    """Conditioning vectors `[B, L, D]` and their mask `[B, L]`, equal to the pipeline's where the mask is 1."""
    first_mask = tokens.attention_mask.new_ones(len(tokens.input_ids), 1)
    prefix_mask = torch.ones_like(tokens.prefix_ids)
    prefix = run_prefix(text_encoder, tokens.prefix_ids, prefix_mask)
    mask = torch.cat([prefix_mask.expand(len(first_mask), -1), tokens.attention_mask], dim=1)
    states = run_after(text_encoder, prefix, tokens.input_ids, mask)
    return states, torch.cat([first_mask, tokens.attention_mask], dim=1)


def drop_prompts(attention_mask: Tensor, dropped: Tensor) -> Tensor:
    """Mask `[B, L]` in which the `dropped` ones of `[B]` are empty prompts: only the first vector is left."""
    return torch.cat([attention_mask[:, :1], attention_mask[:, 1:] * ~dropped[:, None]], dim=1)
