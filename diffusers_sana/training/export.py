"""Taking trained models out of Accelerate's wrappers."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from transformers import PreTrainedModel


def copy_with_weights(
    model: ModelMixin | PreTrainedModel, state: Mapping[str, Tensor]
) -> ModelMixin | PreTrainedModel:
    """A plain model of the class and config of `model`, a diffusers or transformers one, that holds `state`.

    It shares the tensors of `state`. Meant for saving: compilation, hooks and Accelerate's wrappers stay behind.
    `state` is what `Accelerator.get_state_dict` gathers, or its part for one submodule.
    """
    model_class: Any = type(model)
    with torch.device("meta"):  # no time for an initialisation that is thrown away
        if isinstance(model, PreTrainedModel):
            copy = model_class(model.config)
        else:
            # Without diffusers' note of which values were defaults, by which it would undo `register_to_config`.
            config = {name: value for name, value in model.config.items() if name != "_use_default_values"}
            copy = model_class.from_config(config)
    copy.load_state_dict(state, assign=True)
    return copy


def sub_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict under `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
