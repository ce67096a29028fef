"""The two ways to connect a ControlNet with Sana's transformer; see `SanaControlNetModel`.

Legend: B batch, C latent channels, H W latent height and width, N image tokens, D inner width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


WIRINGS = ("diffusers", "nvlabs")


def control(
    controlnet: Any, hidden_states: Tensor, dtype: torch.dtype, **arguments: Any
) -> tuple[Tensor, ...] | Callable[[Tensor], tuple[Tensor, ...]]:
    """What a transformer takes as `controlnet_block_samples`, in either wiring.

    Args:
        controlnet: a SanaControlNetModel, of diffusers or ours; may be compiled.
        hidden_states: noisy latents `[B, C, H, W]`, of any dtype.
        dtype: of the transformer.
        arguments: the others of `SanaControlNetModel.forward`, but for `return_dict`.

    Returns:
        The outputs; with `wiring="nvlabs"` a function that makes them of the output of the first block, which only the
        transformer of this package takes.
    """

    def samples(stream: Tensor) -> tuple[Tensor, ...]:
        outputs = controlnet(stream.to(controlnet.dtype), **arguments, return_dict=False)[0]
        return tuple(output.to(dtype) for output in outputs)

    return samples if wiring_of(controlnet) == "nvlabs" else samples(hidden_states)


def wiring_of(controlnet: Any) -> str:
    """How a ControlNet, of diffusers or ours, is connected: "diffusers" or "nvlabs"."""
    return controlnet.config.get("wiring", "diffusers")
