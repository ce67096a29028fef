"""Taking trained models out of Accelerate's wrappers."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def copy_with_weights(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A plain model of the class and config of `model`, a diffusers or transformers one, that holds `state`.

    It shares the tensors of `state`. Meant for saving: compilation, hooks and Accelerate's wrappers stay behind.
    `state` is what `Accelerator.get_state_dict` gathers, or its part for one submodule.
    """
    with torch.device("meta"):  # no time for an initialisation that is thrown away
        if hasattr(model, "from_config"):
            copy = type(model).from_config(model.config)
        else:
            copy = type(model)(model.config)
    copy.load_state_dict(state, assign=True)
    return copy


def sub_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict under `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
