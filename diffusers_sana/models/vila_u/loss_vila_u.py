"""The two losses of VILA-U (arXiv 2409.04429, eq. 5 and 7): cross-entropy of the text and of the codes.

Both are means over their own targets and then added, so that the 1024 codes of a picture do not drown a sentence. An
empty term is 0, and its weights still take part, with zero gradients: then all ranks of a distributed run do the same.

Legend: B rows, L positions, H width of the language model, V cells that are targets, D codes a cell.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusers_sana._compat import torch_compilable_check


IGNORED = -100  # label of what is not a target
CHUNK_SIZE = 1024  # rows of logits that exist at a time


def find_targets(
    labels: Tensor,
    is_placeholder: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which positions are to be predicted from the position before them.

    The first position of a sample has none before it; in packed rows it is where `position_ids` is 0, in padded ones
    where what comes before is masked.

    Args:
        labels: `[B, L]`, -100 where ignored.
        is_placeholder: bool `[B, L]`, true at cells of pictures.
        attention_mask: `[B, >= L]`, 0 at padding; masks of other ranks say nothing here.
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
    """Labels that were shifted by whoever split the sequences: what is predicted at each position of a part.

    Args:
        shift_labels: `[B, L]`, -100 where ignored. The last column is about the first position of the next part.
        is_placeholder: bool `[B, L]`, true at cells of images.
        image_token_id: the label of such a cell.

    Returns:
        Labels `[B, L + 1]`, and two bool masks `[B, L + 1]` as `find_targets` returns them.

    Raises:
        ValueError: the next part begins with a cell of an image, whose codes are not here.
    """
    torch_compilable_check(
        (shift_labels[:, -1] != image_token_id).all(),
        lambda: (
            "`shift_labels` must not end with a cell of an image: split the sequences elsewhere, or set it to -100"
        ),
    )
    labels, is_cell = F.pad(shift_labels, (1, 0), value=IGNORED), F.pad(is_placeholder, (0, 1))
    is_target = labels != IGNORED
    return labels, is_target & ~is_cell, is_target & is_cell


def states_before(hidden_states: Tensor, is_target: Tensor) -> Tensor:
    """From `[B, L, H]` the states `[n, H]` at the positions before the n targets of `[B, L or L + 1]`."""
    return hidden_states[:, : is_target.shape[1] - 1][is_target[:, 1:]]


def at_least_one(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """States `[n, H]` and targets `[n, ...]` as they are; where n is 0, one zero state with ignored targets.

    The zero state is padding, so that the gradient, zero as well, still reaches whatever the states come from.
    """
    if len(states):
        return states, targets
    return F.pad(states, (0, 0, 0, 1)), targets.new_full((1, *targets.shape[1:]), IGNORED)


def chunked_cross_entropy(
    states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], chunk_size: int | None = None
) -> Tensor:
    """Sum of the cross-entropies of `head(states)`, without ever holding more than one chunk of logits.

    The logits of a chunk are made again in the backward pass: one 256 pixel picture has 67 MB of them in float32.

    Args:
        states: `[n, E]`.
        targets: `[n]`, -100 where ignored.
        head: maps `[m, E]` to logits `[m, classes]`.
        chunk_size: rows of a chunk; None for `CHUNK_SIZE`.
    """

    def of_chunk(rows: Tensor, their_targets: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), their_targets, ignore_index=IGNORED, reduction="sum")

    chunk_size = chunk_size or CHUNK_SIZE
    if len(states) <= chunk_size:
        return of_chunk(states, targets)
    chunks = zip(states.split(chunk_size), targets.split(chunk_size), strict=True)
    return torch.stack(
        [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    ).sum()


def mean_of(total: Tensor, count: int, given_count: Tensor | int | None) -> Tensor:
    """A loss from its sum: over the targets here, or over as many as the caller says a whole batch has."""
    return total / (max(count, 1) if given_count is None else given_count)
