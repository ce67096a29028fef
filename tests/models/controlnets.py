"""Tiny Sana ControlNets and their inputs, shared by the tests."""

from typing import Any

import diffusers
import torch
from torch import Tensor

from diffusers_sana import SanaControlNetModel
from tests.models.sana_transformers import TINY, excite


STRENGTH = 0.05  # how far, relatively, a control image must move the prediction for a comparison to say something


def tiny_controlnet(**overrides: Any) -> SanaControlNetModel:
    """Two blocks that fit the tiny transformers, in eval mode; also what is zero in a new one is not."""
    return excite(SanaControlNetModel(**{**TINY, "num_layers": 2, **overrides})).eval()


def diffusers_twin(model: SanaControlNetModel) -> diffusers.SanaControlNetModel:
    """The diffusers class with the same configuration and weights."""
    config = {name: value for name, value in model.config.items() if name not in ("qk_norm", "wiring")}
    twin = diffusers.SanaControlNetModel.from_config(config)
    twin.load_state_dict(model.state_dict())
    return twin.to(model.dtype).train(model.training)


def tiny_control(model: SanaControlNetModel) -> dict[str, Tensor]:
    """Keyword arguments of `forward` for two images of 8x6 latent cells; the first text has one token."""
    generator = torch.Generator().manual_seed(2)
    shape = (2, model.config["in_channels"], 8, 6)
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, model.config["caption_channels"], generator=generator),
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([[1], [5]])).long(),
        "timestep": torch.tensor([700.0, 40.0]),
        "controlnet_cond": torch.randn(shape, generator=generator),
    }
