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
from transformers import DynamicCache, PreTrainedModel

from diffusers_sana._compat import upstream_instruction


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
    return "\n".join(upstream_instruction())


def tokenize_prompts(
    tokenizer: Any, prompts: list[str], max_sequence_length: int = 300, instruction: str = ""
) -> PromptTokens:
    """Lower-case, strip and tokenize prompts after `instruction`; longer ones are cut as the pipeline cuts them.

    Raises a ValueError when the tokenizer merges the instruction's tokens differently before some prompt.
    """
    if isinstance(prompts, str):
        raise TypeError("`prompts` must be a list of str, got a str. Put it into a list.")
    prefix = tokenizer.encode(instruction)[:-1] if instruction else [tokenizer.bos_token_id]
    tokens = tokenizer(
        [instruction + prompt.lower().strip() for prompt in prompts],
        padding="longest",
        padding_side="right",
        max_length=len(prefix) + max_sequence_length - 1,
        truncation=True,
        return_tensors="pt",
    )
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
    batch_size = len(tokens.input_ids)
    prefix = text_encoder(tokens.prefix_ids, past_key_values=DynamicCache(config=text_encoder.config), use_cache=True)
    first = prefix.last_hidden_state[:, :1].expand(batch_size, -1, -1)  # [B, 1, D]
    first_mask = tokens.attention_mask.new_ones(batch_size, 1)
    if tokens.input_ids.shape[1] == 0:  # nothing but BOS
        return first, first_mask
    cache = prefix.past_key_values
    cache.batch_repeat_interleave(batch_size)
    prefix_mask = first_mask.expand(-1, tokens.prefix_ids.shape[1])
    rest = text_encoder(
        tokens.input_ids, torch.cat([prefix_mask, tokens.attention_mask], dim=1), past_key_values=cache
    ).last_hidden_state  # [B, S, D]
    return torch.cat([first, rest], dim=1), torch.cat([first_mask, tokens.attention_mask], dim=1)


def drop_prompts(attention_mask: Tensor, dropped: Tensor) -> Tensor:
    """Mask `[B, L]` in which the `dropped` ones of `[B]` are empty prompts: only the first vector is left."""
    return torch.cat([attention_mask[:, :1], attention_mask[:, 1:] * ~dropped[:, None]], dim=1)
