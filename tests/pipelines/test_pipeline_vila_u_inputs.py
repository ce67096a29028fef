"""What `VilaUPipeline` refuses, and how it says so."""

import pytest
import torch

from diffusers_sana import VilaUPipeline
from tests.models.vila_u.tiny import shared_model, tiny_model
from tests.models.vila_u.tiny_processor import tiny_processor


@pytest.fixture(scope="module")
def pipe():
    return VilaUPipeline(shared_model(), tiny_processor())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": 3}, TypeError, "`prompt` must be a string or a list of strings, got 3"),
        ({"prompt": []}, ValueError, "`prompt` must have at least one text"),
        ({"prompt": "a <image>"}, ValueError, "`images` must be as many as the placeholders"),
        ({"negative_prompt": 3}, TypeError, "`negative_prompt` must be a string"),
        ({"negative_prompt": ["a", "c"]}, ValueError, "`negative_prompt` must be one for each of 1 prompts, got 2"),
        ({"num_images_per_prompt": 0}, ValueError, "`num_images_per_prompt` must be at least 1, got 0"),
        ({"num_frames": 1.5}, TypeError, "`num_frames` must be an integer, got 1.5"),
        ({"num_frames": 0}, ValueError, "`num_frames` must be at least 1, got 0"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "a list of 1, one per image, got 2"),
        ({"guidance_scale": [1.0, 2.0]}, ValueError, "`guidance_scale` must be a number or have one entry per prompt"),
        ({"guidance_scale": torch.nan}, ValueError, "`guidance_scale` must be finite"),
        ({"guidance_scale": torch.inf}, ValueError, "`guidance_scale` must be finite"),
        ({"temperature": 0}, ValueError, "`temperature` must be above 0"),
        ({"temperature": torch.nan}, ValueError, "`temperature` must be above 0 and finite"),
        ({"temperature": torch.inf}, ValueError, "`temperature` must be above 0 and finite"),
        ({"top_p": torch.nan}, ValueError, "`top_p` must be above 0"),
        ({"prompt": "a \ud800"}, ValueError, "`prompt` must be text that UTF-8 can encode"),
        ({"output_type": "jpg"}, ValueError, "`output_type` must be one of"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, ValueError, r"names out of \['codes'\], got 'latents'"),
    ],
)
def test_call(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe(**{"prompt": "a cat"} | arguments)


@pytest.mark.parametrize(
    "name",
    ["model.language_model.norm.weight", "depth_transformer.layers.0.mlp.fc2.weight", "depth_transformer.head.bias"],
)
def test_weights_that_are_nan(name):
    pipe = VilaUPipeline(tiny_model(), tiny_processor())
    pipe.set_progress_bar_config(disable=True)
    parameters = dict(pipe.model.named_parameters())
    parameters[name].data.view(-1)[0] = torch.nan
    for options in ({}, {"guidance_scale": 1.0}, {"do_sample": False}):
        with pytest.raises(ValueError, match="the model produced NaN or infinite logits"):
            pipe("a cat", output_type="latent", **options)


def test_pixels_that_are_nan():
    pipe = VilaUPipeline(tiny_model(), tiny_processor())
    pipe.set_progress_bar_config(disable=True)
    last = [each for name, each in pipe.model.model.vision_tower.named_parameters() if name.endswith("conv_out.bias")]
    last[-1].data[0] = torch.nan
    with pytest.raises(ValueError, match="`model` gave NaN or infinite pixels"):
        pipe("a cat")
