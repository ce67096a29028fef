"""The rows of an image on several processes, in the autoencoder.

The stages of DC-AE next to the pixels, which need nearly all of the memory, have a small receptive field (see
`exact_tiling`). Each process runs them on its own rows and a halo, and the results are gathered. The deep stages, in
which attention sees the whole image, run in every process, without communication. So all get the result of one.

Legend: B images, H rows in units of the shallow stages.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor

from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC, Decoder, Encoder


@contextmanager
def vae_parallel(vae: AutoencoderDC, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Within it, each process of a group encodes and decodes some rows of each image; all get the whole result.

    Every process must make the same calls with the same inputs. Tiles and slices of the autoencoder work as without.

        with vae_parallel(pipe.vae):
            image = pipe(prompt, generator=torch.Generator().manual_seed(0)).images[0]

    Args:
        vae: our `AutoencoderDC`.
        group: of `torch.distributed`; all processes by default.

    Raises:
        TypeError: for another autoencoder.
        RuntimeError: for a call with gradients, which communication has not.
    """
    if not isinstance(vae, AutoencoderDC):
        raise TypeError(f"`vae` must be a `diffusers_sana.AutoencoderDC`, got {type(vae).__name__}.")
    hooks = ((vae.encoder, EncoderRowsHook(group)), (vae.decoder, DecoderRowsHook(group)))
    for half, hook in hooks:
        HookRegistry.check_if_exists_or_initialize(half).register_hook(hook, "vae_parallel")
    try:
        yield
    finally:
        for half, _ in hooks:
            HookRegistry.check_if_exists_or_initialize(half).remove_hook("vae_parallel", recurse=False)


class RowsHook(ModelHook):
    """What the hooks of both halves share.

    Args:
        group: as in `vae_parallel`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        """Refuses what would have no gradient."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
            raise RuntimeError(
                "`vae_parallel` has no gradients, because communication between the processes has none. Call the "
                "autoencoder under `torch.no_grad()`; train with data parallelism."
            )
        return args, kwargs


class EncoderRowsHook(RowsHook):
    """Splits the shallow stages of an encoder."""

    def new_forward(self, module: Encoder, hidden_states: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        """As `Encoder.forward`."""
        function, end = partial(module.tiled_shallow_stages, tile=tile), module.shallow_end
        return module.deep_stages(map_rows(function, hidden_states, end.halo, end.unit, 1, self.group))


class DecoderRowsHook(RowsHook):
    """Splits the shallow stages of a decoder."""

    def new_forward(self, module: Decoder, hidden_states: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        """As `Decoder.forward`."""
        function, end = partial(module.tiled_shallow_stages, tile=tile), module.shallow_end
        return map_rows(function, module.deep_stages(hidden_states), end.halo, 1, end.unit, self.group)


def map_rows(
    function: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    halo: int,
    unit_in: int,
    unit_out: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """`function(hidden_states)`, some rows in each process; exact if the receptive field is within `halo`.

    Args:
        function: `[B, C, h * unit_in, W * unit_in]` to `[B, C', h * unit_out, W * unit_out]` for any h.
        hidden_states: `[B, C, H * unit_in, W * unit_in]`, the same in all processes.
        halo: units of context above and below.
        unit_in, unit_out: height of a unit before and after `function`.
        group: the processes.

    Returns:
        `[B, C', H * unit_out, W * unit_out]`, channels-last, the same bits in all processes.
    """
    num_rows, size = hidden_states.shape[2] // unit_in, dist.get_world_size(group)
    share = -(-num_rows // size)
    # Equally many rows for each process; where they do not divide evenly, some are computed twice.
    starts = [min(rank * share, num_rows - share) for rank in range(size)]

    start = starts[dist.get_rank(group)]
    first = max(start - halo, 0)
    own = function(hidden_states[:, :, first * unit_in : (start + share + halo) * unit_in])
    own = own[:, :, (start - first) * unit_out : (start - first + share) * unit_out].movedim(1, -1)

    # Image by image, so that a process that turns to slices for lack of memory still meets the others.
    whole = own.new_empty(len(own), num_rows * unit_out, *own.shape[2:])
    for rows, image in zip(own, whole, strict=True):
        pieces = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(pieces, rows.contiguous(), group=group)
        for start, piece in zip(starts, pieces, strict=True):
            image[start * unit_out : (start + share) * unit_out] = piece
    return whole.movedim(-1, 1)
