"""`encode_text`: the text's work done once per prompt, with the result of doing it at every step."""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading

from diffusers_sana.models.transformers.attention_sana import SanaAttnProcessor, SanaTextState
from tests.models.sana_transformers import FAMILIES, tiny_inputs, tiny_model, upstream_twin
from tests.numerics import assert_close_fp32, relative_error


# Token counts of the prompts, the kept length, how many cost no attention, whether a mask remains.
LENGTHS = {
    "equal": ([4, 4, 4], 4, 0, False),
    "mixed": ([2, 5, 3], 5, 0, True),
    "full": ([7, 7, 7], 7, 0, False),
    "cfg": ([1, 5, 5], 5, 1, False),
    "cfg_mixed": ([1, 1, 5, 3], 5, 2, True),
    "single_later": ([4, 1, 4], 4, 0, True),
    "all_single": ([1, 1], 1, 2, False),
    "nothing_valid": ([0, 3, 0], 7, 0, True),
}


def with_context(model, inputs):
    inputs = dict(inputs)
    text = (inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask"))
    return model(encoder_hidden_states=None, text_context=model.encode_text(*text), **inputs).sample


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_context_equals_diffusers(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model, 4)
    assert_close_fp32(with_context(model, inputs), upstream_twin(model)(**inputs).sample)


@pytest.mark.parametrize("lengths", LENGTHS)
@torch.no_grad()
def test_masked_tokens_are_dropped(lengths):
    lengths, kept, num_single, masked = LENGTHS[lengths]
    model = tiny_model()
    inputs = tiny_inputs(model, len(lengths))
    inputs["encoder_attention_mask"] = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    expected = model(**inputs).sample
    # What is masked must not matter, not even when it is not a number.
    dropped = (inputs["encoder_attention_mask"] == 0) & (torch.tensor(lengths)[:, None] > 0)
    inputs["encoder_hidden_states"][dropped & (torch.arange(7) >= kept)] = float("nan")

    context = model.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
    for state in context.states:
        assert state.key.shape == state.value.shape == (len(lengths) - num_single, kept, 2, 16)
        assert (0 if state.constant is None else len(state.constant)) == num_single
    assert (context.attention_mask is not None) == masked
    assert_close_fp32(with_context(model, inputs), expected)


@torch.no_grad()
def test_valid_tokens_need_not_come_first():
    model = tiny_model()
    inputs = tiny_inputs(model, 3)
    inputs["encoder_attention_mask"] = torch.tensor(
        [[0, 0, 0, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]], dtype=torch.bool
    )
    expected = upstream_twin(model)(**inputs).sample
    assert model.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]).states[
        0
    ].key.shape == (
        2,
        3,
        2,
        16,
    )
    assert_close_fp32(with_context(model, inputs), expected)


@pytest.mark.parametrize("shape", [None, (2, 1, 7), (2, 48, 7)], ids=["none", "additive", "additive_per_query"])
@torch.no_grad()
def test_other_masks_keep_all_tokens(shape):
    model = tiny_model()
    inputs = tiny_inputs(model)
    inputs["encoder_attention_mask"] = shape and torch.randn(shape)
    assert_close_fp32(with_context(model, inputs), upstream_twin(model)(**inputs).sample)


@torch.no_grad()
def test_a_context_serves_all_steps():
    model = tiny_model()
    inputs = tiny_inputs(model)
    text = {name: inputs.pop(name) for name in ("encoder_hidden_states", "encoder_attention_mask")}
    context = model.encode_text(**text)
    calls = []
    for module in (model.caption_projection, *(block.attn2.to_k for block in model.transformer_blocks)):
        module.register_forward_hook(lambda *_: calls.append(1))
    for time in (900.0, 500.0, 1.0):
        inputs["timestep"] = torch.full((2,), time)
        with_it = model(encoder_hidden_states=None, text_context=context, **inputs).sample
        assert not calls
        assert_close_fp32(with_it, model(**text, **inputs).sample)
        calls.clear()


def test_gradients_flow_through_a_context():
    model = tiny_model().train()
    inputs = tiny_inputs(model)
    gradients = []
    for forward in (lambda **kwargs: model(**kwargs).sample, lambda **kwargs: with_context(model, kwargs)):
        forward(**inputs).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        model.zero_grad()
    assert_close_fp32(gradients[1], gradients[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_with_a_context(checkpointing):
    model = tiny_model().train()
    inputs = tiny_inputs(model)
    expected = with_context(model, inputs)
    if checkpointing:
        model.enable_gradient_checkpointing()
    actual = with_context(model, inputs)
    assert torch.equal(actual, expected)
    actual.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropout_reaches_single_token_prompts():
    model = tiny_model(dropout=0.5).train()
    inputs = tiny_inputs(model)
    context = model.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
    assert context.states[0].constant is None
    out = model.transformer_blocks[0].attn2(
        torch.randn(2, 5, 32), encoder_hidden_states=context.states[0], attention_mask=context.attention_mask
    )
    assert (out[0] == 0).any()


@torch.no_grad()
def test_lora_scale_reaches_the_context():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v", "linear_1"], init_lora_weights=False))
    inputs = tiny_inputs(model)
    text = {name: inputs.pop(name) for name in ("encoder_hidden_states", "encoder_attention_mask")}
    full = model(**text, **inputs).sample
    half = model(**text, **inputs, attention_kwargs={"scale": 0.5}).sample
    assert relative_error(half, full) > 1e-3
    context = model.encode_text(**text, attention_kwargs={"scale": 0.5})
    assert_close_fp32(
        model(encoder_hidden_states=None, text_context=context, **inputs, attention_kwargs={"scale": 0.5}).sample, half
    )
    context = model.encode_text(**text)  # the scale was undone
    assert_close_fp32(model(encoder_hidden_states=None, text_context=context, **inputs).sample, full)


class ScaledText:
    """A user's cross-attention processor, without `encode_text`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None):
        return SanaAttnProcessor()(attn, hidden_states, encoder_hidden_states * 1.5, attention_mask)


@torch.no_grad()
def test_third_party_processors_get_the_projected_text():
    model = tiny_model()
    inputs = tiny_inputs(model)
    before = model(**inputs).sample
    model.transformer_blocks[1].attn2.set_processor(ScaledText())
    expected = model(**inputs).sample
    assert relative_error(expected, before) > 1e-3
    context = model.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
    assert [tuple(state.shape) for state in context.states] == [(2, 5, 32)] * 3
    assert_close_fp32(with_context(model, inputs), expected)


@pytest.mark.parametrize("offload", ["model", "sequential", "block_level", "leaf_level"])
@torch.no_grad()
def test_context_of_offloaded_weights(offload, tmp_path):
    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = with_context(model, inputs)
    if offload == "model":
        loads = []

        class Load(accelerate.hooks.ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                loads.append(module)
                return args, kwargs

        accelerate.hooks.add_hook_to_module(model, Load())
        model.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
        assert loads == [model]
    elif offload == "sequential":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.proj_out.weight.device.type == "meta"
    else:
        # Weights on disk leave uninitialized memory behind, which the test session fills with NaN.
        groups = {"num_blocks_per_group": 1} if offload == "block_level" else {}
        apply_group_offloading(
            model, torch.device("cpu"), offload_type=offload, offload_to_disk_path=str(tmp_path), **groups
        )
        assert model.caption_projection.linear_1.weight.isnan().all()
    assert_close_fp32(with_context(model, inputs), expected)


@torch.no_grad()
def test_compiled_whole_and_by_block():
    model = tiny_model(num_layers=1)
    inputs = tiny_inputs(model)
    expected = model(**inputs).sample
    whole = torch.compile(model, fullgraph=True, backend="eager")
    assert_close_fp32(whole(**inputs).sample, expected)
    assert_close_fp32(with_context(whole, inputs), expected)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert_close_fp32(model(**inputs).sample, expected)
    assert_close_fp32(with_context(model, inputs), expected)


def test_context_is_frozen():
    model = tiny_model()
    inputs = tiny_inputs(model)
    context = model.encode_text(inputs["encoder_hidden_states"])
    with pytest.raises(AttributeError):
        context.states = ()
    assert isinstance(context.states[0], SanaTextState)
