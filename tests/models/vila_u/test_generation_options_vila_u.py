"""What a caller of `generate` may say, and may not; pixels of codes."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from tests.models.vila_u.tiny import GREEDY, NEGATIVE, PROMPTS, prompt, random_codes, shared_model


def test_decode_image_tokens():
    model = shared_model()
    codes = random_codes(5)
    pixels = model.decode_image_tokens(codes)
    assert pixels.shape == (5, 3, 32, 32)
    for shape in (codes.flatten(0, 1), codes.unflatten(0, (5, 1))):
        torch.testing.assert_close(model.decode_image_tokens(shape, chunk_size=2).view_as(pixels), pixels)


def test_defaults_come_from_the_generation_config():
    model = shared_model()
    row = prompt(PROMPTS[0])
    config = GenerationConfig(visual_do_sample=False, visual_guidance_scale=5.0, do_sample=True, temperature=0.1)
    gold = model.generate(**row, **GREEDY, guidance_scale=5.0)
    assert torch.equal(model.generate(**row, generation_mode="image", generation_config=config), gold)
    part = GenerationConfig(visual_guidance_interval=[0.5, 1.0])
    halves = [model.generate(**row, **GREEDY, **option) for option in ({"generation_config": part}, {})]
    assert torch.equal(halves[0], model.generate(**row, **GREEDY, guidance_interval=(0.5, 1)))
    assert not torch.equal(*halves)
    before = model.generation_config
    try:
        model.generation_config = config
        assert torch.equal(model.generate(**row, generation_mode="image"), gold)
        assert torch.equal(
            model.generate(**row, generation_mode="image", guidance_scale=1.0),
            model.generate(**row, **GREEDY, guidance_scale=1.0),
        )
    finally:
        model.generation_config = before


ERRORS = [
    ({"generation_mode": "audio"}, "`generation_mode` must be"),
    ({"num_frames": 2}, "`num_frames` is for"),
    ({"negative_input_ids": None}, "guidance needs `negative_input_ids`"),
    ({"guidance_scale": [1.0, 2.0, 3.0]}, r"`guidance_scale` must be a number or have one entry per prompt \(2\)"),
    *(
        ({"guidance_interval": interval}, "`guidance_interval` must be .* got")
        for interval in ((0.5, 0.5), (-0.1, 1), (0, 1.1), (0.5,))
    ),
    ({"generator": [torch.Generator()]}, r"`generator` must have one generator per sample \(2\), got 1"),
    ({"num_return_sequences": 0}, "must be at least 1, got 1 and 0"),
    ({"cache_implementation": "none"}, "`cache_implementation` must be"),
    ({"temperature": 0.0}, "`temperature` must be above 0"),
    ({"top_k": -1}, "`top_k` must be 0"),
    ({"top_p": 0.0}, "`top_p` must be above 0"),
    ({"attention_mask": torch.tensor([[1] * 7, [1] * 6 + [0]])}, "mask of `input_ids` must .* on the left"),
    ({"negative_input_ids": torch.tensor([NEGATIVE] * 3)}, "`negative_input_ids` must be"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        shared_model().generate(**(prompt(*PROMPTS) | {"generation_mode": "image"} | options))


def test_output_as_in_transformers():
    model = shared_model()
    row = prompt(PROMPTS[0])
    codes = model.generate(**row, **GREEDY)
    outputs = model.generate(**row, **GREEDY, return_dict_in_generate=True)
    assert isinstance(outputs, GenerateDecoderOnlyOutput)
    assert torch.equal(outputs.sequences, codes)
    assert set(outputs) == {"sequences"}
    assert model.generate(**row, **GREEDY, return_dict_in_generate=False).equal(codes)
    video = {"generation_mode": "video", "num_frames": 1, "do_sample": False}
    assert torch.equal(model.generate(**row, **video, return_dict_in_generate=True).sequences[:, 0], codes)


def test_leading_pads_without_a_mask():
    model = shared_model()
    inputs = prompt(*PROMPTS)
    gold = model.generate(**inputs, **GREEDY)
    del inputs["attention_mask"]
    assert torch.equal(model.generate(inputs.pop("input_ids"), **inputs, **GREEDY), gold)
