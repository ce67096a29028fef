"""Sequence parallelism for models with Sana's blocks: each process holds some rows of the token grid.

The processes exchange little. Linear self-attention sums over all tokens into a small per-head state, which is
all-reduced. The 3x3 convolution of the Mix-FFN needs one row above and below those of a process, its halo. Everything
else works per token. diffusers splits and gathers the rows (`_cp_plan` of the models).

Of videos, each process holds some frames. Then only the temporal convolution needs a halo, a frame before and after.
The softmax attention of SANA-Video 2.0 exchanges tokens by Ulysses or Ring, as diffusers has them.

Legend: B batch, D inner width, h rows of a process, w token columns.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from diffusers_sana._compat import MissingHostName, private
from diffusers_sana.models.transformers.tensor_parallel import check_shards, shard, tensor_config_of


def group_of(config: Any) -> dist.ProcessGroup:
    """The processes that share an image, from the `ParallelConfig` that `enable_parallelism` has initialized."""
    return private(config.context_parallel_config, "_flattened_mesh").get_group()


def split_plan(inputs: Mapping[str, tuple[int, int]], output: str = "proj_out") -> dict[str, Any] | None:
    """Where diffusers splits the tokens between processes and gathers them; None if it cannot.

    Args:
        inputs: name of a module whose `input` is split -> the axis, and the number of axes.
        output: name of the module whose output is gathered.
    """
    try:
        from diffusers_sana._compat import ContextParallelInput, ContextParallelOutput
    except MissingHostName:
        return None
    plan: dict[str, Any] = {
        name: {"input": ContextParallelInput(split_dim=axis, expected_dims=axes)}
        for name, (axis, axes) in inputs.items()
    }
    return plan | {output: ContextParallelOutput(gather_dim=1, expected_dims=3)}


def all_reduced(tensor: Tensor, config: Any) -> Tensor:
    """The sum of a tensor over the processes that share an image, in place."""
    dist.all_reduce(tensor, group=group_of(config))
    return tensor


def with_halo(hidden_states: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Adds the neighboring rows of the neighboring processes.

    Args:
        hidden_states: `[B, D, h, w]`, the rows of this process; all have the same B, D and w.
        group: its first process has the uppermost rows.

    Returns:
        `[B, D, h + 2, w]`, channels-last; one row less at the top and at the bottom of the image.
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
    """Adds the halo for a module that maps `[B, D, h, w]` to the same shape and sees one row up and down.

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
        """Removes the rows of the other processes."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        return output[:, :, rank > 0 : output.shape[2] - (rank < size - 1)]


class Rows(NamedTuple):
    """What is split between processes.

    Attributes:
        axis: of the latents.
        name: of one of them, for messages, as the following.
        more: what has more of them.
        choice: the argument that decides on their number.
    """

    axis: int
    name: str
    more: str
    choice: str


ROWS_OF_IMAGE = Rows(-2, "row", "larger image", "height")
FRAMES_OF_VIDEO = Rows(-3, "frame", "longer video", "number of frames")


class RowsHook(ModelHook):
    """On the patch embedding: raises if the rows of the image cannot be split between the processes.

    Args:
        group: the processes.
        is_even: whether all must have the same number of rows.
        rows: what is split.
        patch: latent rows, or frames, per token.
    """

    def __init__(self, group: dist.ProcessGroup, is_even: bool, rows: Rows, patch: int) -> None:
        super().__init__()
        self.size, self.is_even, self.rows, self.patch = dist.get_world_size(group), is_even, rows, patch

    def pre_forward(self, module: Any, hidden_states: Tensor) -> tuple[tuple[Tensor], dict]:
        """Checks the latents, `[B, C, H, W]` or `[B, C, T, H, W]`."""
        rows = hidden_states.shape[self.rows.axis] // self.patch
        if rows < self.size:
            raise ValueError(
                f"`hidden_states` must have at least one {self.rows.name} of tokens per process ({self.size}), got "
                f"{rows}. Generate a {self.rows.more}, or use fewer processes."
            )
        if self.is_even and rows % self.size:
            raise ValueError(
                f"`hidden_states` must have {self.rows.name}s of tokens divisible by the {self.size} processes, got "
                f"{rows}. Choose another {self.rows.choice}, or `ulysses_anything=True` (or `ring_anything=True`) in "
                "`ContextParallelConfig`."
            )
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
            raise RuntimeError(
                "A model with `enable_parallelism` has no gradients, because communication between the processes has "
                "none. Run it under `torch.no_grad()`; train with data parallelism."
            )
        return (hidden_states,), {}


class SequenceParallelMixin:
    """`enable_parallelism` for models with Sana's blocks."""

    patch_embed: Any
    transformer_blocks: nn.ModuleList

    def enable_parallelism(self, *, config: Any, cp_plan: dict[str, Any] | None = None) -> None:
        """Splits the tokens of each image, or the weights, between processes, which all get the same result.

        Call it in each process after initializing `torch.distributed`. Ring and Ulysses are equivalent here: only the
        product of their degrees matters.

        Args:
            config: a `ContextParallelConfig` of diffusers for the tokens, or a `TensorParallelConfig` for the weights,
                which must be equal in all processes (see `tensor_parallel`). With `ulysses_anything=True` or
                `ring_anything=True` the number of token rows is arbitrary; otherwise it must be divisible by the
                number of processes.
            cp_plan: where to split and gather, instead of the model's own plan.
        """
        if (tensor_config := tensor_config_of(config)) is not None and getattr(self, "_parallel_config", None) is None:
            specs = check_shards(self, tensor_config)
            private(self, "_resolve_parallel_config")(config)
            shard(self, specs, private(tensor_config, "_mesh").get_group())
            return
        super().enable_parallelism(config=config, cp_plan=cp_plan)  # type: ignore[misc]
        resolved = self._parallel_config.context_parallel_config  # type: ignore[attr-defined]
        group = group_of(self._parallel_config)  # type: ignore[attr-defined]
        is_even = not (resolved.ulysses_anything or resolved.ring_anything)
        rows, embedding, patch, with_neighbors = self._split_parts()
        hooks = [(embedding, RowsHook(group, is_even, rows, patch))]
        hooks += [(module, HaloHook(group)) for module in with_neighbors]
        for module, hook in hooks:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "sequence_parallel")

    def _split_parts(self) -> tuple[Rows, nn.Module, int, list[nn.Module]]:
        """What is split, the embedding, latent rows per token, and the modules that see neighbors of a row."""
        feed_forwards = [cast(nn.Module, block.ff) for block in self.transformer_blocks]
        return ROWS_OF_IMAGE, self.patch_embed, self.patch_embed.proj.stride[0], feed_forwards
