"""Batches of prompts for the generation loop of VILA-U, and what hides its placeholder from transformers' loops.

Legend: B prompts, N samples (some of each prompt), P prompt length, K codebook entries, T tokens per image.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import CandidateGenerator, LogitsProcessorList


def without_placeholder(input_ids: Tensor, placeholder: int, pad: int) -> Tensor:
    """Replaces placeholders in `[B, P]` ids by the first id of the row, or by `pad`: all are then in the vocabulary.

    The first id is in the prompt anyway, so processors that count the ids of the prompt find nothing new.
    """
    first = input_ids[:, :1]
    return torch.where(input_ids == placeholder, first.masked_fill(first == placeholder, pad), input_ids)


class LogitsProcessorsWithoutPlaceholder(LogitsProcessorList):
    """Processors that never see the image placeholder, which may lie outside the vocabulary and is never generated.

    Args:
        processors: the list to run.
        placeholder: the id.
        pad: see `without_placeholder`.
    """

    def __init__(self, processors: list[Any], placeholder: int, pad: int) -> None:
        super().__init__(processors)
        self.placeholder = placeholder
        self.pad = pad

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """See `LogitsProcessorList`."""
        replaced: Any = without_placeholder(input_ids, self.placeholder, self.pad)
        scores = super().__call__(replaced, scores, **kwargs)
        if self.placeholder < scores.shape[-1]:
            scores[:, self.placeholder] = -torch.inf
        return scores


class CandidatesWithoutPlaceholder(CandidateGenerator):
    """Prompt lookup that never proposes the image placeholder.

    Args:
        lookup: the candidate generator to wrap.
        placeholder, pad: see `without_placeholder`.
    """

    def __init__(self, lookup: CandidateGenerator, placeholder: int, pad: int) -> None:
        self.lookup = lookup
        self.placeholder = placeholder
        self.pad = pad

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`[1, P]` ids followed by candidates; the model rejects those that do not fit."""
        replaced: Any = without_placeholder(input_ids, self.placeholder, self.pad)
        candidates, logits = self.lookup.get_candidates(replaced, **kwargs)
        return torch.cat([input_ids, candidates[:, input_ids.shape[1] :]], dim=1), logits

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: int) -> None:
        """See `CandidateGenerator`."""
        self.lookup.update_candidate_strategy(input_ids, scores, num_matches)


def heal_last_tokens(input_ids: Tensor, logits: Tensor, tokenizer: Any, placeholder: int) -> Tensor:
    """Token healing: replaces the last token of each prompt by the most likely token that begins with its text.

    A prompt that ends in "http:" ends inside what is usually one token: "http" is more often followed by "://".

    Args:
        input_ids: `[B, P]`; a placeholder or special token at the end is kept.
        logits: `[B, vocabulary]`, of the last token.
        tokenizer: of the ids.
        placeholder: the id.

    Returns:
        `[B, P]`.
    """
    vocabulary, special = tokenizer.get_vocab(), {placeholder, *tokenizer.all_special_ids}
    healed = input_ids.clone()
    for row, last in enumerate(input_ids[:, -1].tolist()):
        if last in special:
            continue
        text = tokenizer.convert_ids_to_tokens(last)
        longer = [index for token, index in vocabulary.items() if token.startswith(text) and index not in special]
        choices = torch.tensor(longer, device=logits.device)
        # A small bonus for the current token, as in transformers: "http" should not become "https" without reason.
        healed[row, -1] = choices[(logits[row, choices] + (choices == last)).argmax()]
    return healed


def scales_of_samples(
    guidance_scale: float | Sequence[float] | Tensor, num_prompts: int, samples_per_prompt: int
) -> Tensor:
    """Guidance scales `[N]` from one scale or one per prompt; on the CPU, because they determine the batch size.

    Raises:
        ValueError: another shape, NaN or infinity.
    """
    scales = torch.as_tensor(guidance_scale, dtype=torch.float32).cpu()
    if scales.ndim > 1 or (scales.ndim and len(scales) != num_prompts):
        raise ValueError(
            f"`guidance_scale` must be a number or have one entry per prompt ({num_prompts}), got shape "
            f"{list(scales.shape)}"
        )
    if not bool(scales.isfinite().all()):
        raise ValueError(f"`guidance_scale` must be finite, got {guidance_scale}")
    return scales.expand(num_prompts).repeat_interleave(samples_per_prompt)


def scales_of_tokens(scales: Tensor, interval: Sequence[float], num_images: int, tokens_per_image: int) -> Tensor:
    """Guidance scales `[num_images * T, N, 1]` of all image tokens: those of the samples, and 1 outside the interval.

    Args:
        scales: of the samples, `[N]`.
        interval: start and end of guidance, as fractions of the T tokens of an image.
        num_images: images per sample, one after the other.
        tokens_per_image: T.

    Raises:
        ValueError: the interval does not lie in [0, 1].
    """
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"`guidance_interval` must be (start, end) with 0 <= start < end <= 1, got {interval}")
    places = torch.arange(tokens_per_image) / tokens_per_image
    is_guided = (places >= interval[0]) & (places < interval[1])
    return torch.where(is_guided[:, None, None], scales[:, None], 1.0).repeat(num_images, 1, 1)


def repeat_features(features: Any) -> Any:
    """Image features for the conditional and the unconditional prompts, where both have the same images."""
    return replace(features, pooler_output=features.pooler_output.repeat(2, 1, 1))


def rows_of_samples(
    name: str, ids: Tensor | None, mask: Tensor | None, pad: int, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Repeats `[B or 1, P]` prompts and their mask to `[N, P]`.

    Without a mask, leading pad tokens are padding.

    Raises:
        ValueError: `name` is missing, has a wrong shape, or is padded on the right.
    """
    if ids is None:
        raise ValueError(f"guidance needs `{name}`, which the processor returns; otherwise set `guidance_scale=1`")
    if ids.ndim != 2 or num_samples % len(ids):
        raise ValueError(f"`{name}` must be [prompts, length] for {num_samples} samples, got shape {list(ids.shape)}")
    if mask is None:
        mask = ((ids != pad).cumsum(-1) > 0).long()
    if mask.shape != ids.shape or not mask[:, -1].all():
        raise ValueError(f"the mask of `{name}` must have its shape and end in ones: pad the prompts on the left")
    repeats = num_samples // len(ids)
    return ids.repeat_interleave(repeats, dim=0), mask.repeat_interleave(repeats, dim=0)


def stack_rows(above: Tensor, below: Tensor, filler: int) -> Tensor:
    """Stacks two `[N, P]` of different P to one `[2N, P]`, aligned on the right."""
    length = max(above.shape[1], below.shape[1])
    return torch.cat([F.pad(rows, (length - rows.shape[1], 0), value=filler) for rows in (above, below)])


def cache_for(cache: Cache | None, implementation: str, config: PreTrainedConfig, length: int) -> Cache:
    """`cache`, or a new one for `length` positions of the language model of `config`.

    Raises:
        ValueError: `cache` is not empty, or `implementation` is neither "static" nor "dynamic".
    """
    if cache is not None:
        if int(cache.get_seq_length()):
            raise ValueError(f"`past_key_values` must be empty, got {int(cache.get_seq_length())} positions")
        return cache
    if implementation == "static":
        return StaticCache(config=config.get_text_config(decoder=True), max_cache_len=length)
    if implementation == "dynamic":
        return DynamicCache(config=config.get_text_config(decoder=True))
    raise ValueError(f'`cache_implementation` must be "static" or "dynamic", got {implementation!r}')
