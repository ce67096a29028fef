"""What must not be saved as it is: weights with adapters beside them."""

import sys
from typing import Any

from torch import nn


def check_components(pipe: Any) -> None:
    """Raises ValueError where adapters are beside layers of a component of a pipeline: see `check_saveable`."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            check_saveable(part, name, name in getattr(pipe, "_lora_loadable_modules", ()))


def check_saveable(model: nn.Module, name: str, is_unloaded_by_pipeline: bool = False) -> None:
    """Raises where adapters are beside layers of `model`: a folder of it would have names that no class reads.

    Args:
        model: with or without layers of PEFT.
        name: of the component, for the error.
        is_unloaded_by_pipeline: whether the calls of its pipeline, of that name, concern it. Those of diffusers'
            pipelines concern transformers anyway.

    Raises:
        ValueError: saying what to do.
    """
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if not layers:
        return
    adapters = {name for layer in layers for name in (*layer.active_adapters, *layer.merged_adapters)}
    adapters |= set(getattr(model, "peft_config", ()))
    fused = any(layer.merged_adapters for layer in layers)
    if is_unloaded_by_pipeline or hasattr(model, "load_lora_adapter"):  # a transformer or a ControlNet of diffusers
        unload = "Call `pipe.unload_lora_weights()` before saving"
        kept = f"`pipe.fuse_lora(components=['{name if is_unloaded_by_pipeline else 'transformer'}'])`"
        alone = "`save_lora_weights`"
    else:
        unload = "Call `diffusers.utils.recurse_remove_peft_layers(model)` before saving"
        kept, alone = "`layer.merge()` of PEFT for each layer", "`model.save_pretrained` of transformers"
    raise ValueError(
        f"`{name}` cannot be saved while the adapters {sorted(adapters)} are beside its layers"
        + (" (fused into them, but not unloaded)" if fused else "")
        + f": nothing could load the folder. {unload}"
        + (", which keeps what is fused." if fused else f"; to keep their effect, call {kept} before that.")
        + f" Adapters themselves are saved by {alone}."
    )
