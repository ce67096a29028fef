"""The cheap computation of the text vectors against diffusers' pipeline."""

import diffusers
import pytest
import torch
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline as DiffusersPipeline

from diffusers_sana.prompts.encoding import (
    complex_human_instruction,
    drop_prompts,
    encode_tokens,
    tokenize_prompts,
)
from diffusers_sana.training.objectives.flow_matching import ConditionedTransformer
from tests.numerics import assert_close_fp32
from tests.training.tiny import CAPTIONS, tiny_autoencoder, tiny_text_encoder, tiny_tokenizer, tiny_transformer


def encode_with_diffusers(text_encoder, instruction, max_sequence_length):
    """Positive vectors and mask, then those of the empty negative prompt."""
    pipeline = DiffusersPipeline(
        tiny_tokenizer(),
        text_encoder,
        tiny_autoencoder(),
        tiny_transformer(),
        diffusers.DPMSolverMultistepScheduler(),
    )
    return pipeline.encode_prompt(
        CAPTIONS,
        max_sequence_length=max_sequence_length,
        complex_human_instruction=instruction.split("\n") if instruction else None,
    )


@pytest.mark.parametrize("max_sequence_length", [32, 5], ids=["whole", "cut"])
@pytest.mark.parametrize("sliding_window", [4096, 7], ids=["wide", "narrow"])
@pytest.mark.parametrize("with_instruction", [True, False], ids=["instruction", "plain"])
def test_encode_tokens_equals_the_pipeline(with_instruction, sliding_window, max_sequence_length):
    instruction = complex_human_instruction() if with_instruction else ""
    text_encoder = tiny_text_encoder(sliding_window=sliding_window)
    with torch.no_grad():
        expected, expected_mask, _, _ = encode_with_diffusers(text_encoder, instruction, max_sequence_length)
        tokens = tokenize_prompts(tiny_tokenizer(), CAPTIONS, max_sequence_length, instruction)
        embeds, mask = encode_tokens(text_encoder, tokens)
    length = mask.shape[1]
    assert length <= max_sequence_length
    assert expected_mask[:, length:].sum() == 0
    assert torch.equal(mask, expected_mask[:, :length])
    valid = mask.bool()
    assert expected[:, :length][valid].std() > 0.1
    assert_close_fp32(embeds[valid], expected[:, :length][valid])


def test_a_dropped_prompt_is_the_empty_negative_prompt():
    instruction = complex_human_instruction()
    text_encoder = tiny_text_encoder()
    with torch.no_grad():
        _, _, negative, negative_mask = encode_with_diffusers(text_encoder, instruction, 32)
        embeds, mask = encode_tokens(text_encoder, tokenize_prompts(tiny_tokenizer(), CAPTIONS, 32, instruction))
    dropped = drop_prompts(mask, torch.tensor([True, False, False, True]))
    assert dropped.sum(dim=1).tolist() == [1, mask[1].sum().item(), mask[2].sum().item(), 1]
    assert negative_mask.sum(dim=1).unique().tolist() == [1]
    assert_close_fp32(embeds[:, 0], negative[:1, 0].expand(4, -1))


def test_only_the_empty_prompt_without_instruction():
    tokens = tokenize_prompts(tiny_tokenizer(), ["", ""], 32)
    embeds, mask = encode_tokens(tiny_text_encoder(), tokens)
    assert embeds.shape == (2, 1, 16)
    assert mask.tolist() == [[1], [1]]


def test_gradients_equal_those_of_the_whole_sequence():
    instruction = complex_human_instruction()
    text_encoder = tiny_text_encoder()
    tokens = tokenize_prompts(tiny_tokenizer(), CAPTIONS, 32, instruction)
    weights = torch.randn(4, 1 + tokens.input_ids.shape[1], 16)

    embeds, mask = encode_tokens(text_encoder, tokens)
    (embeds * weights * mask[..., None]).sum().backward()
    cheap = {name: parameter.grad.clone() for name, parameter in text_encoder.named_parameters()}

    text_encoder.zero_grad()
    prefix_ids = tokens.prefix_ids.expand(4, -1)
    whole_mask = torch.cat([torch.ones_like(prefix_ids), tokens.attention_mask], dim=1)
    states = text_encoder(torch.cat([prefix_ids, tokens.input_ids], dim=1), whole_mask).last_hidden_state
    seen = torch.cat([states[:, :1], states[:, prefix_ids.shape[1] :]], dim=1)
    (seen * weights * mask[..., None]).sum().backward()
    for name, parameter in text_encoder.named_parameters():
        assert_close_fp32(cheap[name], parameter.grad, tolerance=1e-4)


def test_tokenize_prompts_refuses_a_tokenizer_that_changes_the_prefix():
    # The instruction ends inside a word, which the tokenizer would join with what follows.
    with pytest.raises(ValueError, match="`instruction` must be tokenized the same"):
        tokenize_prompts(tiny_tokenizer(), ["ue hill"], 32, "a bl")
    with pytest.raises(TypeError, match="`prompts` must be a list"):
        tokenize_prompts(tiny_tokenizer(), "a cat", 32)


def test_conditioned_transformer_ignores_a_dropped_prompt():
    model = ConditionedTransformer(tiny_transformer(), tiny_text_encoder()).eval()
    latents, sigmas = torch.randn(2, 4, 3, 5), torch.tensor([0.3, 0.9])
    first = tokenize_prompts(tiny_tokenizer(), ["a red cat", "a red cat"], 32, complex_human_instruction())
    second = tokenize_prompts(tiny_tokenizer(), ["two dogs on a blue hill", "a"], 32, complex_human_instruction())
    everything, nothing = torch.tensor([True, True]), torch.tensor([False, False])
    with torch.no_grad():
        assert_close_fp32(model(latents, sigmas, first, everything), model(latents, sigmas, second, everything))
        assert not torch.allclose(model(latents, sigmas, first, nothing), model(latents, sigmas, second, nothing))


def test_conditioned_transformer_feeds_the_scheduler_timestep():
    transformer = tiny_transformer().eval()
    transformer.register_to_config(timestep_scale=0.5)
    latents, embeds, mask = torch.randn(1, 4, 3, 5), torch.randn(1, 6, 16), torch.ones(1, 6)
    with torch.no_grad():
        velocity = ConditionedTransformer(transformer)(latents, torch.tensor([0.25]), (embeds, mask))
        expected = transformer(latents, embeds, torch.tensor([125.0]), encoder_attention_mask=mask).sample
    assert torch.equal(velocity, expected)
