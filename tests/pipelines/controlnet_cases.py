"""Pipelines with a ControlNet, tiny and with equal weights in both packages, and arguments for them."""

import inspect

import diffusers
import numpy as np
import torch

import diffusers_sana
from tests import tiny


CAT = "a cat"
EDGES = np.random.default_rng(0).random((1, 32, 32, 3)).astype(np.float32)


def controlnet(library=diffusers_sana, **changes):
    torch.manual_seed(1)
    fields = inspect.signature(diffusers.SanaControlNetModel).parameters
    config = {name: value for name, value in tiny.transformer().config.items() if name in fields}
    model = library.SanaControlNetModel(**config | {"num_layers": 1} | changes)
    weights = model.state_dict()
    model.load_state_dict({name: torch.randn_like(value) * 0.3 for name, value in sorted(weights.items())})
    return model.eval()


def pipeline(library=diffusers_sana, parts=None, **changes):
    """Of `library`, with its own parts or others."""
    parts = {**tiny.components(library, **changes), "controlnet": controlnet(library), **(parts or {})}
    pipe = library.SanaControlNetPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def options(changes):
    """Arguments of a call, beside the prompt."""
    defaults = {
        "num_inference_steps": 2,
        "output_type": "latent",
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        "control_image": EDGES,
        "generator": torch.Generator().manual_seed(3),
    }
    return defaults | changes


def generate(pipe, prompt=CAT, **kwargs):
    return pipe(prompt, **options(kwargs)).images
