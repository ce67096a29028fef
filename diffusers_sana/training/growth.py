"""A deeper transformer made of a trained one, as SANA-1.5 grew from 20 to 60 blocks (arXiv 2501.18427)."""

from typing import Any

import torch
from torch import nn

from diffusers_sana.training.data.batches import unchanged_random_state


DROPPED = 2  # blocks; the paper's last ones had specialized in ending


@torch.no_grad()
def grow_transformer(transformer: Any, num_layers: int, kept_layers: int | None = None, seed: int = 0) -> Any:
    """A transformer of more blocks: the first ones of `transformer`, and new ones that begin as the identity.

    A new block adds nothing to its input at first, because the last layers of its two attentions and of its Mix-FFN
    are zeros; all else in it is random. So the larger model begins as what the kept blocks compute, exactly. This is
    the paper's initialization (partial preservation); copies of trained blocks diverged there.

    Args:
        transformer: a SanaTransformer2DModel; it does not change.
        num_layers: blocks of the new one.
        kept_layers: blocks that are taken over; default: all but the last two, as in the paper. With all of them the
            new model computes what the old one does.
        seed: of the new weights. The global random numbers do not change.

    Returns:
        A new one of the same class, dtype and device.

    Raises:
        ValueError: there are not so many blocks to keep, or none would be new.
    """
    before = transformer.config.num_layers
    kept = before - DROPPED if kept_layers is None else kept_layers
    if not 1 <= kept <= before:
        raise ValueError(
            f"`kept_layers` must be 1 to {before}, the blocks that there are, got {kept}. Name how many to keep."
        )
    if num_layers <= kept:
        raise ValueError(f"`num_layers` must be above the {kept} blocks that are kept, got {num_layers}. Use more.")
    with unchanged_random_state(seed):
        grown = type(transformer).from_config(transformer.config, num_layers=num_layers)
    old = {f"transformer_blocks.{index}." for index in range(kept, before)}
    state = {name: value for name, value in transformer.state_dict().items() if not name.startswith(tuple(old))}
    grown.load_state_dict(grown.state_dict() | state)
    for block in grown.transformer_blocks[kept:]:
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.conv_point):
            for parameter in layer.parameters():
                parameter.zero_()
    nn.Module.to(grown, transformer.device, transformer.dtype)  # diffusers' own `to` warns of the dtype
    return grown.train(transformer.training)
