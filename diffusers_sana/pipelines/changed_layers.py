"""Layers of the transformer that compute something else for one forward pass, as some guiders of diffusers want.

diffusers does this with hooks (`diffusers.hooks.layer_skip`), which leave Sana's feed-forward and its linear attention
alone: they look for classes of other models and for calls of `scaled_dot_product_attention`. Here the `forward` of a
module is replaced, so all of it works, for our transformer and for diffusers', and nothing remains afterwards.

Legend: B images or videos, N tokens of a grid of h x w, or of several such frames, D inner width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks import LayerSkipConfig
from torch import Tensor, nn
from torch.nn import functional as F

from diffusers_sana.models.layers import hooks_of
from diffusers_sana.models.transformers.attention_sana import attend_to_self


BLOCKS = "transformer_blocks"

Change = tuple[nn.Module, Callable[..., Tensor]]  # a module, and its forward for the time being


@contextmanager
def changed_layers(
    transformer: Any, configs: Sequence[Any], grid: tuple[int, int], blur: tuple[float, float] | None = None
) -> Iterator[None]:
    """Within the block, layers of the transformer are skipped, perturbed or blurred. Hold its lock around the block.

    Args:
        transformer: of either package.
        configs: `LayerSkipConfig`s, or `SmoothedEnergyGuidanceConfig`s if `blur` is given.
        grid: h and w.
        blur: sigma in tokens, and the sigma above which it counts as infinite.

    Raises:
        ValueError: a config names layers that do not exist.
    """
    with ExitStack() as stack:
        for config in configs:
            for block in _blocks(transformer, config):
                changes = _skips(block, config) if blur is None else [_blurred_queries(block, grid, *blur)]
                for module, forward in changes:
                    stack.enter_context(_replaced_forward(module, forward))
        yield


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """For the time of the block; offloading may have put a `forward` into the module before."""
    before = {name: value for name, value in vars(module).items() if name == "forward"}
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(before)


def _blocks(transformer: Any, config: Any) -> list[Any]:
    """The blocks that a config names."""
    blocks = getattr(transformer, BLOCKS)
    # A guider that is given numbers of layers makes one config of each, with the number in place of a list.
    indices = [config.indices] if isinstance(config.indices, int) else config.indices
    if config.fqn not in ("auto", BLOCKS):
        raise ValueError(f"`fqn` of a layer config of `guider` must be {BLOCKS!r} or 'auto', got {config.fqn!r}.")
    if not indices or not all(isinstance(index, int) and 0 <= index < len(blocks) for index in indices):
        raise ValueError(
            f"The layers of `guider` must be numbers of the transformer's blocks, 0 to {len(blocks) - 1}, got"
            f" {config.indices}."
        )
    return [blocks[index] for index in indices]


def _skips(block: Any, config: LayerSkipConfig) -> list[Change]:
    """What a `LayerSkipConfig` changes of a block, as in diffusers: what is skipped returns its input."""
    if config.skip_attention and config.skip_attention_scores:
        raise ValueError(
            "`skip_attention` and `skip_attention_scores` of a layer config of `guider` exclude each other."
        )
    if config.skip_attention and config.skip_ff:
        return [_skipped(block, config.dropout)]
    changes = []
    if config.skip_attention:
        changes.append(_skipped(block.attn1, config.dropout))
    if config.skip_attention_scores:

        def values(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return attend_to_self(block.attn1, hidden_states)

        changes.append(_instead(block.attn1, values))
    if config.skip_ff:
        changes.append(_skipped(block.ff, config.dropout))
    return changes


def _skipped(module: nn.Module, dropout: float) -> Change:
    """A module that returns its input; or, with a dropout below 1, its output with so many elements dropped."""
    if dropout < 1:
        forward = module.forward
        return module, lambda *args, **kwargs: F.dropout(forward(*args, **kwargs), p=dropout)
    return _instead(module, lambda hidden_states, *args, **kwargs: hidden_states)


def _instead(module: nn.Module, compute: Callable[..., Tensor]) -> Change:
    if not any(map(hooks_of, module.modules())):
        return module, compute
    run = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        run(*args, **kwargs)  # its hooks, of offloading in groups, also bring the weights of the layer after it
        return compute(*args, **kwargs)

    return module, forward


def _blurred_queries(block: Any, grid: tuple[int, int], sigma: float, infinite: float) -> Change:
    if sigma <= 0:
        raise ValueError(f"`seg_blur_sigma` of `guider` must be above 0, got {sigma}.")
    layer = block.attn1.to_q
    forward = layer.forward
    return layer, lambda *args, **kwargs: blurred(
        forward(*args, **kwargs), grid, math.inf if sigma > infinite else sigma
    )


def blurred(tokens: Tensor, grid: tuple[int, int], sigma: float) -> Tensor:
    """Gaussian blur of `[B, N, D]` over the grid, in fp32, mirrored at its border; the mean where sigma is infinite.

    Each frame of a video is blurred alone. The kernel ends at 3 sigma, or at the width of the grid, as in the code of
    smoothed energy guidance.
    """
    image = tokens.float().unflatten(1, (-1, *grid)).flatten(0, 1)  # [B, or B * frames, h, w, D]
    if math.isinf(sigma):
        return image.mean(dim=(1, 2), keepdim=True).expand_as(image).reshape(tokens.shape).to(tokens.dtype)
    for axis in (1, 2):
        lines = image.movedim(axis, -1)
        length = lines.shape[-1]
        size = min(2 * (math.ceil(6 * sigma) // 2) + 1, 2 * (length // 2) + 1)
        offsets = torch.arange(size, device=tokens.device) - size // 2
        kernel = (-0.5 * (offsets / sigma) ** 2).exp()
        padded = F.pad(lines.reshape(-1, 1, length), (size // 2, size // 2), mode="reflect")
        smooth = F.conv1d(padded, (kernel / kernel.sum())[None, None])
        image = smooth.reshape(lines.shape).movedim(-1, axis)
    return image.reshape(tokens.shape).to(tokens.dtype)
