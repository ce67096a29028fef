"""Wrong inputs end in an error that names the argument, before anything is computed."""

import logging

import diffusers
import pytest
import torch

import diffusers_sana
from tests import tiny
from tests.numerics import assert_close_fp32


CAT = "a cat"
EMBEDS, MASK = torch.zeros(1, 5, tiny.TEXT_WIDTH), torch.ones(1, 5, dtype=torch.long)
NAN = torch.full_like(EMBEDS, torch.nan)


class Computed(Exception):
    """The pipeline went to work in place of refusing."""


@pytest.fixture
def checked(ours, monkeypatch):
    def refuse(*args, **kwargs):
        raise Computed

    monkeypatch.setattr(ours.text_encoder, "forward", refuse)
    monkeypatch.setattr(ours.transformer, "forward", refuse)
    monkeypatch.setattr(ours.scheduler, "set_timesteps", refuse)
    return ours


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "one of `prompt` and `prompt_embeds` must be given, got neither"),
        ({"prompt": CAT, "prompt_embeds": EMBEDS}, ValueError, "`prompt` and `prompt_embeds` must be given, got both"),
        ({"prompt": []}, ValueError, "`prompt` must have at least one text"),
        ({"prompt": 7}, TypeError, "`prompt` must be a string or a list of strings, got 7"),
        ({"prompt": 0}, TypeError, "`prompt` must be a string"),
        ({"prompt": (CAT,)}, TypeError, "`prompt` must be a string"),
        ({"prompt": [CAT, None]}, TypeError, "`prompt` must be a string"),
        ({"prompt": CAT, "negative_prompt": 1.5}, TypeError, "`negative_prompt` must be a string"),
        ({"prompt": CAT, "negative_prompt": ["a", "b"]}, ValueError, "`negative_prompt` must have one entry"),
        ({"prompt": CAT, "height": 33}, ValueError, "`height` must be a multiple of 2, got 33. Use 32 or 34."),
        ({"prompt": CAT, "width": 1}, ValueError, "`width` must be a multiple of 2, got 1. Use 2."),
        ({"prompt": CAT, "width": 0}, ValueError, "`width` must be at least 1"),
        ({"prompt": CAT, "width": -64}, ValueError, "`width` must be at least 1"),
        ({"prompt": CAT, "height": 32.0}, TypeError, "`height` must be an integer"),
        ({"prompt": CAT, "height": "32"}, TypeError, "`height` must be an integer"),
        ({"prompt": CAT, "num_inference_steps": 0}, ValueError, "`num_inference_steps` must be at least 1"),
        ({"prompt": CAT, "num_inference_steps": 2.5}, TypeError, "`num_inference_steps` must be an integer"),
        ({"prompt": CAT, "num_images_per_prompt": 0}, ValueError, "`num_images_per_prompt` must be at least 1"),
        ({"prompt": CAT, "num_images_per_prompt": None}, TypeError, "`num_images_per_prompt` must be an integer"),
        ({"prompt": CAT, "max_sequence_length": 0}, ValueError, "`max_sequence_length` must be at least 1"),
        ({"prompt": "a \ud800"}, ValueError, "`prompt` must be text that UTF-8 can encode, .* at character 2"),
        ({"prompt": [CAT, "\udfff"]}, ValueError, "`prompt` must be text that UTF-8 can encode"),
        ({"prompt": CAT, "negative_prompt": "\ud800"}, ValueError, "`negative_prompt` must be text that UTF-8"),
        (
            {"prompt": CAT, "complex_human_instruction": "\ud800"},
            ValueError,
            "`complex_human_instruction` must be text",
        ),
        ({"prompt": CAT, "complex_human_instruction": 5}, TypeError, "`complex_human_instruction` must be"),
        ({"prompt": CAT, "guidance_scale": "4"}, TypeError, "`guidance_scale` must be a number"),
        ({"prompt": CAT, "attention_kwargs": 0.5}, TypeError, "`attention_kwargs` must be a dict"),
        ({"prompt": CAT, "output_type": "jpeg"}, ValueError, "`output_type` must be one of"),
        ({"prompt": CAT, "timesteps": [9], "sigmas": [1.0]}, ValueError, "`timesteps` and `sigmas` exclude"),
        ({"prompt": CAT, "complex_human_instruction": [1]}, TypeError, "`complex_human_instruction` must be"),
        (
            {"prompt": CAT, "callback_on_step_end_tensor_inputs": ["noise"]},
            ValueError,
            "`callback_on_step_end_tensor_inputs` must be names out of .*got 'noise'",
        ),
        ({"prompt_embeds": EMBEDS}, ValueError, "`prompt_attention_mask` must be given with `prompt_embeds`"),
        (
            {"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK[:, :4]},
            ValueError,
            r"`prompt_attention_mask` must have the shape \[1, 5\], got \[1, 4\]",
        ),
        (
            {"prompt_embeds": EMBEDS[..., :8], "prompt_attention_mask": MASK},
            ValueError,
            r"`prompt_embeds` must have the shape \[prompts, tokens, 16\]",
        ),
        ({"prompt_embeds": EMBEDS[0], "prompt_attention_mask": MASK}, ValueError, "`prompt_embeds` must have"),
        ({"prompt_embeds": NAN, "prompt_attention_mask": MASK}, ValueError, "`prompt_embeds` must be finite"),
        (
            {"prompt_embeds": EMBEDS.long(), "prompt_attention_mask": MASK},
            TypeError,
            "`prompt_embeds` must be a float",
        ),
        ({"prompt_embeds": [[0.0]], "prompt_attention_mask": MASK}, TypeError, "`prompt_embeds` must be a float"),
        (
            {"prompt": CAT, "negative_prompt_embeds": EMBEDS},
            ValueError,
            "`negative_prompt_attention_mask` must be given with `negative_prompt_embeds`",
        ),
        (
            {"prompt": CAT, "negative_prompt_embeds": NAN, "negative_prompt_attention_mask": MASK},
            ValueError,
            "`negative_prompt_embeds` must be finite",
        ),
        (
            {
                "prompt": CAT,
                "negative_prompt": "ugly",
                "negative_prompt_embeds": EMBEDS,
                "negative_prompt_attention_mask": MASK,
            },
            ValueError,
            "`negative_prompt` and `negative_prompt_embeds` exclude",
        ),
        (
            {"prompt": [CAT, CAT], "negative_prompt_embeds": EMBEDS, "negative_prompt_attention_mask": MASK},
            ValueError,
            "`negative_prompt_embeds` must have one entry for each of the 2 prompts, got 1",
        ),
        ({"prompt": CAT, "latents": [1.0]}, TypeError, "`latents` must be a floating point tensor"),
        ({"prompt": CAT, "latents": torch.zeros(1, 4, 16, 16, dtype=torch.int8)}, TypeError, "`latents` must be"),
        ({"prompt": CAT, "latents": torch.zeros(4, 16, 16)}, ValueError, "`latents` must be finite and"),
        ({"prompt": CAT, "latents": torch.full((1, 4, 16, 16), torch.inf)}, ValueError, "`latents` must be finite"),
    ],
)
def test_refused_before_anything_is_computed(checked, arguments, error, message):
    with pytest.raises(error, match=message):
        checked(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": torch.zeros(1, 3, 16, 16)}, r"`latents` must have the shape \[1, 4, 16, 16\]"),
        ({"latents": torch.zeros(2, 4, 16, 16)}, r"`latents` must have the shape \[1, 4, 16, 16\]"),
        ({"latents": torch.zeros(1, 4, 16, 16), "height": 64}, r"`latents` must have the shape \[1, 4, 32, 16\]"),
        ({"generator": [torch.Generator()] * 3}, "`generator` must be one generator or a list of 1"),
        ({"sigmas": [0.5, 1.0]}, "`sigmas` must be"),
        ({"timesteps": [1001]}, "`timesteps` must be"),
        ({"attention_kwargs": {"gain": 2}}, "`attention_kwargs` may only hold `scale`"),
    ],
)
def test_refused(ours, arguments, message):
    with pytest.raises(ValueError, match=message):
        ours(CAT, num_inference_steps=1, **arguments)


def test_attention_kwargs_of_a_transformer_that_ignores_them(caplog):
    """diffusers' own, which says nothing."""
    parts = tiny.components(diffusers_sana) | {"transformer": tiny.transformer(diffusers)}
    pipe = diffusers_sana.SanaPipeline(**parts)
    logging.getLogger("diffusers_sana").addHandler(caplog.handler)
    try:
        pipe(CAT, num_inference_steps=1, output_type="latent", attention_kwargs={"scale": 0.5})
        assert "attention_kwargs" not in caplog.text
        pipe(CAT, num_inference_steps=1, output_type="latent", attention_kwargs={"gain": 2})
    finally:
        logging.getLogger("diffusers_sana").removeHandler(caplog.handler)
    assert "`attention_kwargs` ['gain'] are not expected by diffusers' transformer" in caplog.text


def test_empty_prompt_is_a_prompt(ours):
    assert ours("", num_inference_steps=1, output_type="pt").images.isfinite().all()
    bare = {"complex_human_instruction": None, "output_type": "pt"}
    assert ours("", num_inference_steps=1, **bare).images.isfinite().all()


def test_text_encoder_that_overflows(ours, monkeypatch):
    forward = ours.text_encoder.forward
    monkeypatch.setattr(ours.text_encoder, "forward", lambda *args, **kwargs: (forward(*args, **kwargs)[0] * 1e39,))
    with pytest.raises(ValueError, match="`text_encoder` gave NaN or infinite features"):
        ours(CAT, num_inference_steps=1)


def test_tokenizer_without_a_first_token():
    components = tiny.components(diffusers_sana)
    components["tokenizer"].add_bos_token = False
    pipe = diffusers_sana.SanaPipeline(**components)
    with pytest.raises(ValueError, match="`tokenizer` gives no token for an empty prompt"):
        pipe("", num_inference_steps=1, complex_human_instruction=None)


def test_parts_that_are_missing(ours):
    without = {name: None for name in ("tokenizer", "text_encoder", "vae")}
    pipe = diffusers_sana.SanaPipeline(**ours.components | without)
    with pytest.raises(ValueError, match="`output_type` must be 'latent'"):
        pipe(CAT)
    with pytest.raises(ValueError, match="`prompt` needs a tokenizer and a text encoder"):
        pipe(CAT, output_type="latent")


def test_negative_embeds_are_needed_without_text_encoder(ours):
    pipe = diffusers_sana.SanaPipeline(**ours.components | {"tokenizer": None, "text_encoder": None})
    with pytest.raises(ValueError, match="`negative_prompt_embeds` must be given"):
        pipe(prompt_embeds=EMBEDS, prompt_attention_mask=MASK, num_inference_steps=1)


def test_scheduler_without_sigmas(upstream):
    with pytest.raises(ValueError, match="does not support custom"):
        diffusers_sana.SanaPipeline(**upstream.components)(CAT, sigmas=[1.0])


class TestLongPrompts:
    WORDS = "a fox on the moon, " * 400

    @pytest.fixture
    def warnings(self, caplog):
        return lambda: [record.message for record in caplog.records if "is longer than" in record.message]

    @pytest.mark.parametrize("argument", ["prompt", "negative_prompt"])
    def test_what_is_cut_is_said(self, ours, warnings, argument):
        texts = {"prompt": CAT, argument: self.WORDS}
        ours(**texts, num_inference_steps=1, output_type="latent")
        (message,) = warnings()
        assert f"`{argument}` is longer than 300 tokens (`max_sequence_length`)" in message
        # 299 characters are seen, one a token but for a space, which joins the letter behind it.
        assert "the moon" in message
        assert "more characters" in message

    def test_of_several_prompts(self, ours, warnings):
        ours([CAT, "x" * 301, CAT], num_inference_steps=1, output_type="latent", max_sequence_length=300)
        (message,) = warnings()
        assert message.endswith("This is left out: 'xx'.")

    def test_nothing_is_said_of_others(self, ours, warnings):
        ours("x" * 298, num_inference_steps=1, output_type="latent")
        assert warnings() == []

    def test_features_are_those_of_diffusers(self, ours, upstream):
        options = {"complex_human_instruction": ["Describe:", "Prompt: "], "device": torch.device("cpu")}
        embeds, mask, _, _ = ours.encode_prompt(self.WORDS, False, **options)
        wanted, wanted_mask, _, _ = upstream.encode_prompt(self.WORDS, False, **options)
        assert torch.equal(mask, wanted_mask)
        assert_close_fp32(embeds, wanted)
