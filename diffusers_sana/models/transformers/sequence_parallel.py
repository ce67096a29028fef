"""Sequence parallelism of the models with Sana's blocks: each process holds some rows of the token grid.

Little has to pass between the processes. Linear self-attention sums over all tokens once, into a small state a head,
which is all-reduced. The 3x3 convolution of the Mix-FFN sees one row beyond the first and the last of a process, its
halo. All else works on single tokens. The rows are split and gathered by diffusers (`_cp_plan` of the models).

Legend: B batch, D inner width, h rows of a process, w token columns.
"""

from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from diffusers_sana._compat import MissingHostName, private


def group_of(config: Any) -> dist.ProcessGroup:
    """The processes that share a picture, from the `ParallelConfig` that `enable_parallelism` has set up."""
    return private(config.context_parallel_config, "_flattened_mesh").get_group()


def split_plan() -> dict[str, Any] | None:
    """Where diffusers splits the rows of tokens between processes and gathers them; None where it cannot."""
    try:
        from diffusers_sana._compat import ContextParallelInput, ContextParallelOutput
    except MissingHostName:
        return None
    return {
        "patch_embed.flatten": {"input": ContextParallelInput(split_dim=1, expected_dims=4)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


def all_reduced(tensor: Tensor, config: Any) -> Tensor:
    """The sum of a tensor over the processes that share a picture, in place."""
    dist.all_reduce(tensor, group=group_of(config))
    return tensor


def with_halo(hidden_states: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Adds the neighbouring rows of the neighbouring processes.

    Args:
        hidden_states: `[B, D, h, w]`, the rows of this process; all have the same B, D and w.
        group: its first process has the uppermost rows.

    Returns:
        `[B, D, h + 2, w]`, channels-last; one row fewer each at the upper and the lower end of the picture.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rows = hidden_states.movedim((2, 1), (0, 3))  # [h, B, w, D]
    above, below = rank > 0, rank < size - 1
    sent = torch.cat([rows[:above], rows[len(rows) - below :]])
    received = torch.empty_like(sent)
    sizes = [int(abs(other - rank) == 1) for other in range(size)]
    dist.all_to_all_single(received, sent, sizes, sizes, group=group)
    rows = torch.cat([piece.movedim(0, 1) for piece in (received[:above], rows, received[above:])], dim=1)
    return rows.movedim(3, 1)


class HaloHook(ModelHook):
    """Lets a module `[B, D, h, w]` to the same shape, which sees one row up and down, see those of other processes.

    Args:
        group: as in `with_halo`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def pre_forward(self, module: nn.Module, hidden_states: Tensor) -> tuple[tuple[Tensor], dict]:
        """Adds the halo."""
        return (with_halo(hidden_states, self.group),), {}

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        """Takes off the rows that other processes have."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        return output[:, :, rank > 0 : output.shape[2] - (rank < size - 1)]


class RowsHook(ModelHook):
    """On `patch_embed`: raises where the rows of the picture cannot be shared.

    Args:
        group: the processes.
        is_even: whether all must have as many.
    """

    def __init__(self, group: dist.ProcessGroup, is_even: bool) -> None:
        super().__init__()
        self.size, self.is_even = dist.get_world_size(group), is_even

    def pre_forward(self, module: Any, hidden_states: Tensor) -> tuple[tuple[Tensor], dict]:
        """Checks the latents `[B, C, H, W]`."""
        rows = hidden_states.shape[-2] // module.proj.stride[0]
        if rows < self.size:
            raise ValueError(
                f"`hidden_states` must have a row of tokens for each of the {self.size} processes, got {rows}. Draw "
                "a larger picture, or with fewer processes."
            )
        if self.is_even and rows % self.size:
            raise ValueError(
                f"`hidden_states` must have rows of tokens divisible by the {self.size} processes, got {rows}. Choose "
                "another height, or `ulysses_anything=True` (or `ring_anything=True`) in `ContextParallelConfig`."
            )
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
            raise RuntimeError(
                "A model with `enable_parallelism` has no gradients: what the processes send each other would have "
                "none. Run it under `torch.no_grad()`; train with data parallelism."
            )
        return (hidden_states,), {}


class SequenceParallelMixin:
    """What `enable_parallelism` of diffusers lacks for a model with Sana's blocks."""

    patch_embed: nn.Module
    transformer_blocks: nn.ModuleList

    def enable_parallelism(self, *, config: Any, cp_plan: dict[str, Any] | None = None) -> None:
        """Shares the tokens of each picture among processes, which all get the same result.

        Call it in each process, after `torch.distributed` has been initialized. Ring and Ulysses are the same here:
        only the product of their degrees matters.

        Args:
            config: a `ContextParallelConfig` of diffusers. With `ulysses_anything=True` or `ring_anything=True` any
                number of token rows will do, else the number must be divisible by that of the processes.
            cp_plan: where to split and to gather, in place of the model's own plan.
        """
        super().enable_parallelism(config=config, cp_plan=cp_plan)  # type: ignore[misc]
        resolved = self._parallel_config.context_parallel_config  # type: ignore[attr-defined]
        group = group_of(self._parallel_config)  # type: ignore[attr-defined]
        is_even = not (resolved.ulysses_anything or resolved.ring_anything)
        hooks = [(self.patch_embed, RowsHook(group, is_even))]
        hooks += [(block.ff, HaloHook(group)) for block in self.transformer_blocks]
        for module, hook in hooks:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "sequence_parallel")
