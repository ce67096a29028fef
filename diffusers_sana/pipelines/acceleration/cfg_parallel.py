"""The halves of classifier-free guidance, or any batch, on several processes.

Each process runs its part of the batch through the model and gathers the predictions of the others, so that all
continue with the same bits. Several prompts are distributed in the same way.

Legend: B rows of the batch.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from diffusers_sana.models.transformers.text_sana import SanaTextContext


@contextmanager
def cfg_parallel(*models: nn.Module, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Within it, each process of a group runs its part of the batch: with two, one half of the guidance each.

    Every process must make the same calls with the same inputs, so with equal seeds.

        with cfg_parallel(pipe.transformer):
            image = pipe(prompt, generator=torch.Generator().manual_seed(0)).images[0]

    Args:
        models: transformers or ControlNets, whose batch is axis 0 of the `hidden_states`.
        group: of `torch.distributed`; all processes by default.
    """
    for model in models:
        HookRegistry.check_if_exists_or_initialize(model).register_hook(BatchParallelHook(group), "cfg_parallel")
    try:
        yield
    finally:
        for model in models:
            HookRegistry.check_if_exists_or_initialize(model).remove_hook("cfg_parallel", recurse=False)


class BatchParallelHook(ModelHook):
    """Gives a model the rows of the batch that are this process's, and returns those of all.

    Args:
        group: as in `cfg_parallel`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        self.batch_size = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        """Takes the rows out of all arguments."""
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        kwargs |= dict(zip(names, args, strict=False))
        self.batch_size = len(kwargs["hidden_states"])
        return (), {name: self._share(value) for name, value in kwargs.items()}

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Gathers all outputs."""
        return self._gather(output)

    def _share_of(self, rank: int) -> slice:
        """Rows of a process, equally many for each; where they do not divide evenly, the last parts overlap."""
        share = -(-self.batch_size // dist.get_world_size(self.group))
        start = min(rank * share, self.batch_size - share)
        return slice(start, start + share)

    def _share(self, value: Any) -> Any:
        """The rows of whatever has a row for each of the batch; other values as they are."""
        rows = self._share_of(dist.get_rank(self.group))
        if isinstance(value, Tensor):
            return value[rows] if value.ndim and len(value) == self.batch_size else value
        if isinstance(value, SanaTextContext):
            return value.rows(rows.start, rows.stop)
        if isinstance(value, list | tuple):
            return type(value)(self._share(item) for item in value)
        if callable(value):  # a ControlNet that starts from the first block's output
            return lambda stream: self._share(value(self._gather(stream)))
        return value

    def _gather(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.contiguous()
            pieces = [torch.empty_like(value) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(pieces, value, group=self.group)
            # Of overlapping parts, the rows of the first process.
            return torch.cat(
                [piece[rank * len(value) - self._share_of(rank).start :] for rank, piece in enumerate(pieces)]
            )
        if isinstance(value, BaseOutput):
            return type(value)(**{name: self._gather(item) for name, item in value.items()})
        return type(value)(self._gather(item) for item in value)
