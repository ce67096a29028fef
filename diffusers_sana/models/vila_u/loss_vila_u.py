"""The two losses of VILA-U (arXiv 2409.04429, eq. 5 and 7): cross-entropy of text and of codes.

Each is the mean over its own targets; then they are added, so that the 1024 codes of an image do not outweigh a
sentence. An empty term is 0, and its weights still get zero gradients, so that all ranks of a distributed run do the
same.

Legend: B rows, L positions, H width of the language model, V image tokens that are targets, D codes per image token.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusers_sana._compat import torch_compilable_check


IGNORED = -100  # label of positions that are not targets
CHUNK_SIZE = 1024  # rows of logits in memory at a time


def find_targets(
    labels: Tensor,
    is_placeholder: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which positions are predicted from the position before them.

    The first position of a sample has none before it. In packed rows it is where `position_ids` is 0, in padded rows
    where the position before is masked.

    Args:
        labels: `[B, L]`, -100 where ignored.
        is_placeholder: bool `[B, L]`, true at image tokens.
        attention_mask: `[B, >= L]`, 0 at padding.
        position_ids: `[B or 1, L]`.

    Returns:
        Two bool masks `[B, L]`: text targets, visual targets.
    """
    is_target = labels != IGNORED
    is_target[:, 0] = False
    if attention_mask is not None and attention_mask.ndim == 2:
        is_target[:, 1:] &= attention_mask[:, -labels.shape[1] :][:, :-1] != 0
    if position_ids is not None:
        is_target &= position_ids != 0
    return is_target & ~is_placeholder, is_target & is_placeholder


def unshift(shift_labels: Tensor, is_placeholder: Tensor, image_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Undoes the shift of labels of a part of the sequences.

    Args:
        shift_labels: `[B, L]`, -100 where ignored. The last column belongs to the first position of the next part.
        is_placeholder: bool `[B, L]`, true at image tokens.
        image_token_id: the label of such an image token.

    Returns:
        Labels `[B, L + 1]`, and two bool masks `[B, L + 1]` as `find_targets` returns them.

    Raises:
        ValueError: the next part begins with an image token, whose codes are not available.
    """
    torch_compilable_check(
        (shift_labels[:, -1] != image_token_id).all(),
        lambda: "`shift_labels` must not end with an image token. Split the sequences elsewhere, or set it to -100",
    )
    labels, is_image = F.pad(shift_labels, (1, 0), value=IGNORED), F.pad(is_placeholder, (0, 1))
    is_target = labels != IGNORED
    return labels, is_target & ~is_image, is_target & is_image


def states_before(hidden_states: Tensor, is_target: Tensor) -> Tensor:
    """The states `[n, H]`, of `[B, L, H]`, at the positions before the n targets of `[B, L or L + 1]`."""
    return hidden_states[:, : is_target.shape[1] - 1][is_target[:, 1:]]


def at_least_one(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """States `[n, H]` and targets `[n, ...]` unchanged; if n is 0, one zero state with ignored targets.

    The zero state is padding, so that a zero gradient still reaches the layers that produced the states.
    """
    if len(states):
        return states, targets
    return F.pad(states, (0, 0, 0, 1)), targets.new_full((1, *targets.shape[1:]), IGNORED)


def chunked_cross_entropy(
    states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], chunk_size: int | None = None
) -> Tensor:
    """Sum of the cross-entropies of `head(states)`, with at most one chunk of logits in memory.

    The logits of a chunk are recomputed in the backward pass: those of one 256 pixel image take 67 MB in float32.

    Args:
        states: `[n, E]`.
        targets: `[n]`, -100 where ignored.
        head: maps `[m, E]` to logits `[m, classes]`.
        chunk_size: rows per chunk; None for `CHUNK_SIZE`.
    """

    def of_chunk(rows: Tensor, chunk_targets: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), chunk_targets, ignore_index=IGNORED, reduction="sum")

    chunk_size = chunk_size or CHUNK_SIZE
    if len(states) <= chunk_size:
        return of_chunk(states, targets)
    chunks = zip(states.split(chunk_size), targets.split(chunk_size), strict=True)
    return torch.stack(
        [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    ).sum()


def mean_of(total: Tensor, count: int, total_count: Tensor | int | None) -> Tensor:
    """A loss from its sum, divided by the number of targets here, or by `total_count`, that of the whole batch."""
    return total / (max(count, 1) if total_count is None else total_count)
