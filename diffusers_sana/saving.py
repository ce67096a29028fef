"""What must not be saved as it is: weights with adapters beside them."""

import sys

from torch import nn


def check_saveable(model: nn.Module, name: str) -> None:
    """Raises where adapters are beside layers of `model`: a folder of it would have names that no class reads.

    Args:
        model: with or without layers of PEFT.
        name: of the component, for the error.

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
    raise ValueError(
        f"`{name}` cannot be saved while the adapters {sorted(adapters)} are beside its layers"
        + (" (fused into them, but not unloaded)" if fused else "")
        + ": nothing could load the folder. Call `pipe.unload_lora_weights()` before saving"
        + (
            ", which keeps what is fused."
            if fused
            else "; to keep their effect, call `pipe.fuse_lora(components=['transformer'])` before that."
        )
        + " Adapters themselves are saved by `save_lora_weights`."
    )
