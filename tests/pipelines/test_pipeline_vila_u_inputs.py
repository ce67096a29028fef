"""What `VilaUPipeline` refuses, and how it says so."""

import pytest
import torch

from diffusers_sana import VilaUPipeline
from tests.models.vila_u.tiny import shared_model
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
        ({"generator": [torch.Generator()] * 2}, ValueError, "a list of 1, one a picture, got 2"),
        ({"guidance_scale": [1.0, 2.0]}, ValueError, "`guidance_scale` must be a number or one for each"),
        ({"temperature": 0}, ValueError, "`temperature` must be above 0"),
        ({"output_type": "jpg"}, ValueError, "`output_type` must be one of"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, ValueError, r"names out of \['codes'\], got 'latents'"),
    ],
)
def test_call(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe(**{"prompt": "a cat"} | arguments)
