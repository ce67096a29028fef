"""Which tokens the denoiser sees: equal to diffusers' where a token is valid, and zero elsewhere."""

import hashlib
import logging

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

import diffusers_sana
from diffusers_sana.prompts import tokenization
from diffusers_sana.prompts.tokenization import COMPLEX_HUMAN_INSTRUCTION
from tests import tiny
from tests.numerics import assert_close_fp32


PROMPTS = ["A cat", "  two DOGS on a rather long walk through a town in the evening, painted in oil  "]
INSTRUCTION = list(COMPLEX_HUMAN_INSTRUCTION)


@pytest.mark.parametrize("instruction", [INSTRUCTION, ["Draw:", ""], None], ids=["default", "short", "none"])
@pytest.mark.parametrize("max_sequence_length", [300, 40, 1])
def test_equals_diffusers(ours, upstream, instruction, max_sequence_length):
    arguments = {
        "prompt": PROMPTS,
        "negative_prompt": "Ugly",
        "max_sequence_length": max_sequence_length,
        "complex_human_instruction": instruction,
    }
    embeds, mask, negative, negative_mask = ours.encode_prompt(**arguments)
    with torch.no_grad():
        theirs = upstream.encode_prompt(**arguments)
    assert embeds.shape == (2, max_sequence_length, tiny.TEXT_WIDTH)
    for (actual, actual_mask), (expected, expected_mask) in (
        ((embeds, mask), theirs[:2]),
        ((negative, negative_mask), theirs[2:]),
    ):
        assert torch.equal(actual_mask, expected_mask)
        assert_close_fp32(actual, expected * expected_mask[..., None])


def test_rows_of_a_prompt_are_neighbors(ours):
    """diffusers interleaves the features and tiles the masks."""
    single = ours.encode_prompt(PROMPTS, negative_prompt=["x", "yyy"])
    double = ours.encode_prompt(PROMPTS, negative_prompt=["x", "yyy"], num_images_per_prompt=2)
    assert not torch.equal(single[1][0], single[1][1])
    for one, two in zip(single, double, strict=True):
        assert torch.equal(two, one[[0, 0, 1, 1]])


def test_empty_negative_prompt_is_one_token(ours):
    _, _, negative, mask = ours.encode_prompt(PROMPTS)
    assert mask.sum(dim=1).tolist() == [1, 1]
    assert torch.equal(negative[0], negative[1])


def test_no_guidance_no_negative(ours):
    assert ours.encode_prompt("a", do_classifier_free_guidance=False)[2:] == (None, None)


def test_one_negative_prompt_is_encoded_once(ours, monkeypatch):
    rows, forward = [], ours.text_encoder.forward

    def watched(input_ids, **kwargs):
        rows.append(len(input_ids))
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(ours.text_encoder, "forward", watched)
    ours.encode_prompt(PROMPTS, num_images_per_prompt=3)
    assert rows == [2, 1]


def test_the_tokenizer_is_left_alone(ours):
    before = ours.tokenizer.padding_side
    ours.encode_prompt("a")
    assert ours.tokenizer.padding_side == before == "left"


def test_dtype_is_that_of_the_text_encoder(ours):
    given = torch.zeros(1, 4, tiny.TEXT_WIDTH, dtype=torch.float16), torch.ones(1, 4)
    embeds, _, negative, _ = ours.encode_prompt(None, prompt_embeds=given[0], prompt_attention_mask=given[1])
    assert embeds.dtype == negative.dtype == torch.float32


def test_adapters_of_the_text_encoder_are_scaled_and_scaled_back():
    pipe = tiny.pipeline(diffusers_sana)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=0.6, target_modules=["q_proj"]), pipe.text_encoder)
    layer = pipe.text_encoder.layers[0].self_attn.q_proj
    before, during = dict(layer.scaling), []

    def fail(*args):
        during.append(dict(layer.scaling))
        raise KeyboardInterrupt

    layer.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        pipe.encode_prompt("a", lora_scale=0.7)
    assert during == [{"default": before["default"] * 0.7}]
    assert layer.scaling == before


def test_the_default_instruction_is_the_one_of_the_checkpoints():
    """A change of it in diffusers would change every image; this is the text that Sana was trained with."""
    digest = hashlib.sha256("\n".join(COMPLEX_HUMAN_INSTRUCTION).encode()).hexdigest()
    assert digest == "48290080bb4fd4a264bdc81d0647ac0221359a36506e2b3e954616d6cb48c3da"


@pytest.mark.parametrize(
    ("given", "text"), [(None, ""), ("", ""), ([], ""), (["a", "b "], "a\nb "), ("a\nb ", "a\nb ")]
)
def test_join_instruction(given, text):
    assert tokenization.join_instruction(given) == text


class TestCleanCaptions:
    caption = " <p>A Cat &amp; Dog</p> https://example.com/cat.png 1234567 "

    def test_is_lower_case_by_default(self):
        assert tokenization.clean_captions([" A Cat "]) == ["a cat"]

    def test_equals_diffusers(self, upstream):
        cleaned = tokenization.clean_captions([self.caption], clean_caption=True)
        assert cleaned == upstream._text_preprocessing([self.caption], clean_caption=True)
        assert "http" not in cleaned[0]

    def test_without_the_packages_it_needs(self, monkeypatch, caplog):
        from diffusers.pipelines.sana import pipeline_sana

        monkeypatch.setattr(pipeline_sana, "is_ftfy_available", lambda: False)
        with caplog.at_level(logging.WARNING):
            assert tokenization.clean_captions([" A <b>Cat"], clean_caption=True) == ["a <b>cat"]
        assert "ftfy" in caplog.text


class TestSharedMask:
    """`share_prompt_mask`: the negative prompt under the mask of the prompt, with what the model makes of padding."""

    ARGUMENTS = {"prompt": PROMPTS, "negative_prompt": ["", "Ugly"], "max_sequence_length": 40}

    def test_features_are_those_of_the_padded_texts(self, ours, upstream):
        embeds, mask, negative, negative_mask = ours.encode_prompt(**self.ARGUMENTS, share_prompt_mask=True)
        with torch.no_grad():
            *_, expected, own_mask = upstream.encode_prompt(**self.ARGUMENTS)
        assert torch.equal(negative_mask, mask)
        assert (mask.sum(dim=1) > own_mask.sum(dim=1)).all()
        assert_close_fp32(negative, expected)
        assert torch.equal(embeds, ours.encode_prompt(**self.ARGUMENTS)[0])

    def test_the_empty_text_with_and_without_padding(self, ours):
        """Remembered as two texts."""
        arguments = {"prompt": "A cat", "max_sequence_length": 1}
        one = ours.encode_prompt(**arguments)[2]
        padded = ours.encode_prompt(**arguments | {"max_sequence_length": 6}, share_prompt_mask=True)[2]
        again = ours.encode_prompt(**arguments)[2]
        assert torch.equal(one, again)
        assert_close_fp32(padded[:, :1], one)
        assert padded[:, 1:].abs().amin(dim=(0, 2)).gt(0).all()

    @pytest.mark.parametrize("name", ["SanaPipeline", "SanaPAGPipeline", "SanaImg2ImgPipeline", "SanaInpaintPipeline"])
    def test_in_pipelines(self, ours, upstream, name):
        pipe = getattr(diffusers_sana, name).from_pipe(ours)
        image = {"image": torch.zeros(1, 3, 32, 32), "mask_image": torch.ones(1, 32, 32)}
        image = {key: value for key, value in image.items() if name.startswith(("SanaIm", "SanaIn"))}
        if name == "SanaImg2ImgPipeline":
            del image["mask_image"]
        options = {"num_inference_steps": 2, **self.ARGUMENTS, **image}
        made = tiny.generate(pipe, **options, share_prompt_mask=True)
        with torch.no_grad():
            _, mask, expected, _ = upstream.encode_prompt(**self.ARGUMENTS)
        features = {"negative_prompt_embeds": expected, "negative_prompt_attention_mask": mask}
        assert_close_fp32(made, tiny.generate(pipe, **options | {"negative_prompt": ""} | features))
        assert not torch.allclose(made, tiny.generate(pipe, **options), rtol=1e-3)
        with pytest.raises(ValueError, match="`share_prompt_mask` needs the negative prompt as a text"):
            tiny.generate(pipe, **options | {"negative_prompt": ""} | features, share_prompt_mask=True)
