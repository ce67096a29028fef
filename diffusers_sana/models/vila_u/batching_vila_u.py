"""Prompts as the generation loop of VILA-U wants them, and what keeps its placeholder from transformers' own loops.

Legend: B prompts, N samples (some of each prompt), P prompt length, K codebook entries, T cells of a picture.
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
    """`[B, P]` ids that all lie in the vocabulary: the first id of a row, or `pad`, in place of each placeholder.

    The first id is in the prompt anyway, so that whoever counts what the prompt holds finds nothing new.
    """
    first = input_ids[:, :1]
    return torch.where(input_ids == placeholder, first.masked_fill(first == placeholder, pad), input_ids)


class LogitsProcessorsWithoutPlaceholder(LogitsProcessorList):
    """Processors that never meet the placeholder of images: it may lie outside the vocabulary, or is never written.

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
        shown: Any = without_placeholder(input_ids, self.placeholder, self.pad)
        scores = super().__call__(shown, scores, **kwargs)
        if self.placeholder < scores.shape[-1]:
            scores[:, self.placeholder] = -torch.inf
        return scores


class CandidatesWithoutPlaceholder(CandidateGenerator):
    """Prompt lookup that never proposes the placeholder of images.

    Args:
        lookup: finds candidates in the prompt.
        placeholder, pad: see `without_placeholder`.
    """

    def __init__(self, lookup: CandidateGenerator, placeholder: int, pad: int) -> None:
        self.lookup = lookup
        self.placeholder = placeholder
        self.pad = pad

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`[1, P]` ids to the same with candidates behind them; what is no candidate after all the model refuses."""
        shown: Any = without_placeholder(input_ids, self.placeholder, self.pad)
        candidates, logits = self.lookup.get_candidates(shown, **kwargs)
        return torch.cat([input_ids, candidates[:, input_ids.shape[1] :]], dim=1), logits

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: int) -> None:
        """See `CandidateGenerator`."""
        self.lookup.update_candidate_strategy(input_ids, scores, num_matches)


def heal_last_tokens(input_ids: Tensor, logits: Tensor, tokenizer: Any, placeholder: int) -> Tensor:
    """Prompts whose last token is chosen anew among those that begin with its text, as token healing does.

    A prompt that ends in "http:" was cut where no training text is cut: "http" is more often followed by "://".

    Args:
        input_ids: `[B, P]`; a placeholder or a special token at the end stays.
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
        # A little in favor of the token as it is, as in transformers: "http" is not to become "https" for nothing.
        healed[row, -1] = choices[(logits[row, choices] + (choices == last)).argmax()]
    return healed


def scales_of_samples(guidance_scale: float | Sequence[float] | Tensor, prompts: int, samples_of_each: int) -> Tensor:
    """Guidance scales `[N]` from one, or one for each prompt; on the CPU, as they decide how many rows there are.

    Raises:
        ValueError: another shape, NaN or infinity.
    """
    scales = torch.as_tensor(guidance_scale, dtype=torch.float32).cpu()
    if scales.ndim > 1 or (scales.ndim and len(scales) != prompts):
        raise ValueError(
            f"`guidance_scale` must be a number or one for each of {prompts} prompts, but has shape "
            f"{list(scales.shape)}"
        )
    if not bool(scales.isfinite().all()):
        raise ValueError(f"`guidance_scale` must be finite, but is {guidance_scale}")
    return scales.expand(prompts).repeat_interleave(samples_of_each)


def scales_of_cells(scales: Tensor, interval: Sequence[float], pictures: int, cells: int) -> Tensor:
    """Guidance scales `[pictures * T, N, 1]` from those of the samples `[N]`: the same, and 1 outside the interval.

    Args:
        scales: of the samples.
        interval: where a picture is guided: from which to which share of its T cells.
        pictures: how many, one after the other.
        cells: T.

    Raises:
        ValueError: no interval of [0, 1].
    """
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"`guidance_interval` must be (start, end) with 0 <= start < end <= 1, but is {interval}")
    places = torch.arange(cells) / cells
    is_guided = (places >= interval[0]) & (places < interval[1])
    return torch.where(is_guided[:, None, None], scales[:, None], 1.0).repeat(pictures, 1, 1)


def twice(features: Any) -> Any:
    """Features of pictures for guidance whose unconditional prompts have the same pictures."""
    return replace(features, pooler_output=features.pooler_output.repeat(2, 1, 1))


def rows_of_samples(
    name: str, ids: Tensor | None, mask: Tensor | None, pad: int, samples: int
) -> tuple[Tensor, Tensor]:
    """From `[B or 1, P]` prompts and their mask `[N, P]`: each as often as it is needed.

    Without a mask, leading pad tokens are padding.

    Raises:
        ValueError: naming `name`; missing, a wrong shape, or padding on the right.
    """
    if ids is None:
        raise ValueError(f"guidance needs `{name}`, which the processor makes; or give `guidance_scale=1`")
    if ids.ndim != 2 or samples % len(ids):
        raise ValueError(f"`{name}` must be [prompts, length] for {samples} samples, but has shape {list(ids.shape)}")
    if mask is None:
        mask = ((ids != pad).cumsum(-1) > 0).long()
    if mask.shape != ids.shape or not mask[:, -1].all():
        raise ValueError(f"the mask of `{name}` must have its shape and end in ones: pad the prompts on the left")
    repeats = samples // len(ids)
    return ids.repeat_interleave(repeats, dim=0), mask.repeat_interleave(repeats, dim=0)


def stack_rows(above: Tensor, below: Tensor, filler: int) -> Tensor:
    """Two `[N, P]` of different P to one `[2N, P]`, aligned on the right."""
    length = max(above.shape[1], below.shape[1])
    return torch.cat([F.pad(rows, (length - rows.shape[1], 0), value=filler) for rows in (above, below)])


def cache_for(given: Cache | None, implementation: str, config: PreTrainedConfig, length: int) -> Cache:
    """The given cache, or a new one for `length` positions of the language model of `config`.

    Raises:
        ValueError: the given one holds something; or `implementation` is neither "static" nor "dynamic".
    """
    if given is not None:
        if int(given.get_seq_length()):
            raise ValueError(f"`past_key_values` must be empty, but holds {int(given.get_seq_length())} positions")
        return given
    if implementation == "static":
        return StaticCache(config=config.get_text_config(decoder=True), max_cache_len=length)
    if implementation == "dynamic":
        return DynamicCache(config=config.get_text_config(decoder=True))
    raise ValueError(f'`cache_implementation` must be "static" or "dynamic", but is {implementation!r}')
