"""LongSANA's block-causal model: a stream of chunks is one long forward, with a state of constant size."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from torch import nn

from diffusers_sana import SanaVideoState
from diffusers_sana.kernels.relu_linear_attention import rotate_pairs
from tests.models.sana_video_transformers import tiny_inputs, tiny_model
from tests.numerics import assert_close_fp32, relative_error


CHUNKS = (4, 2, 2)


class DenseAttention:
    """The same attention as a product with an N x N matrix, in which a token sees its own chunk and earlier ones."""

    def __call__(self, attn, hidden_states, rotary_emb):
        query, key = attn.norm_q(attn.to_q(hidden_states)).relu(), attn.norm_k(attn.to_k(hidden_states)).relu()
        heads = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, attn.to_v(hidden_states)))
        query, key, value = heads
        chunk = torch.repeat_interleave(torch.arange(len(CHUNKS)), torch.tensor(CHUNKS) * 6)  # of tokens
        is_seen = chunk[:, None] >= chunk
        turned = rotate_pairs(query, *rotary_emb) @ rotate_pairs(key, *rotary_emb).mT * is_seen
        out = turned @ value / (query @ key.mT * is_seen).sum(dim=-1, keepdim=True)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class CutConvolution(nn.Module):
    """The temporal convolution of each chunk and the frame before it."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, video):
        ends = torch.tensor(CHUNKS).cumsum(0).tolist()
        parts = [video[:, :, max(end - size - 1, 0) : end] for size, end in zip(CHUNKS, ends, strict=True)]
        return torch.cat([self.conv(part)[:, :, -size:] for part, size in zip(parts, CHUNKS, strict=True)], dim=2)


def inputs_of(model, dtype=torch.float32):
    inputs = tiny_inputs(model, 2, sum(CHUNKS)) | {"timestep": torch.tensor([700.0, 40.0])}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def stream(model, inputs, forget=lambda state: state):
    """Samples of all chunks and the last state; `forget` changes the state between them."""
    samples, state = [], SanaVideoState()
    for chunk in inputs["hidden_states"].split(CHUNKS, dim=2):
        sample, state = model(**inputs | {"hidden_states": chunk}, state=forget(state), return_dict=False)
        samples.append(sample)
    return torch.cat(samples, dim=2), state


@torch.no_grad()
def test_stream_equals_one_long_forward():
    model = tiny_model().double()
    inputs = inputs_of(model, dtype=torch.float64)
    actual, state = stream(model, inputs)
    assert state.frames == 8
    whole = model(**inputs).sample
    for block in model.transformer_blocks:
        block.attn1.processor = DenseAttention()
        block.ff.conv_temp = CutConvolution(block.ff.conv_temp)
    expected = model(**inputs).sample
    assert relative_error(actual, expected) < 1e-12
    assert relative_error(actual, whole) > 0.01  # tokens see no later chunk


@pytest.mark.parametrize(
    "forget",
    [
        lambda state: state._replace(frames=0),
        lambda state: state._replace(blocks=tuple(block._replace(frame=None) for block in state.blocks)),
        lambda state: state._replace(blocks=tuple(block._replace(attention=None) for block in state.blocks)),
    ],
    ids=["positions", "frame", "attention"],
)
@torch.no_grad()
def test_every_part_of_the_state_matters(forget):
    model = tiny_model()
    inputs = inputs_of(model)
    assert relative_error(stream(model, inputs, forget=forget)[0], stream(model, inputs)[0]) > 1e-3


@pytest.mark.parametrize("overrides", [{}, {"patch_size": (2, 1, 2)}, {"guidance_embeds": True}], ids=str)
@torch.no_grad()
def test_a_single_chunk_is_a_whole_video(overrides):
    model = tiny_model(**overrides)
    inputs = tiny_inputs(model)
    output = model(**inputs, state=SanaVideoState())
    assert torch.equal(output.sample, model(**inputs).sample)
    assert output.state.frames == 4 // model.config.patch_size[0]


@torch.no_grad()
def test_state_has_a_constant_size_and_is_not_changed():
    model = tiny_model()
    inputs = inputs_of(model)
    first = stream(model, inputs)[1]
    kept = [[tensor.clone() for tensor in block] for block in first.blocks]
    outputs = [model(**inputs, state=first) for _ in range(2)]
    assert torch.equal(outputs[0].sample, outputs[1].sample)
    for block, before, copies in zip(outputs[0].state.blocks, first.blocks, kept, strict=True):
        assert [tensor.shape for tensor in block] == [(2, 2, 17, 16), (2, 3, 2, 32)]
        assert block.attention.dtype == torch.float32
        for old, copy, new in zip(before, copies, block, strict=True):
            assert torch.equal(old, copy)
            assert new.untyped_storage().nbytes() == new.numel() * new.element_size()  # not a slice of more


@torch.no_grad()
def test_half_precision_keeps_the_sums_in_fp32():
    model = tiny_model()
    inputs = inputs_of(model)
    expected, _ = stream(model, inputs)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    actual, state = stream(model.bfloat16(), half)
    assert all(block.attention.dtype == torch.float32 for block in state.blocks)
    assert relative_error(actual.float(), expected) < 0.05


@torch.no_grad()
def test_lora_scale_and_text_context_work_in_a_stream():
    model = tiny_model()
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv_temp"], init_lora_weights=False))
    inputs = inputs_of(model) | {"attention_kwargs": {"scale": 0.0}}
    without = stream(model, inputs)[0]
    assert relative_error(stream(model, inputs | {"attention_kwargs": None})[0], without) > 1e-3
    text = inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask")
    inputs |= {"encoder_hidden_states": None, "text_context": model.encode_text(*text)}
    assert_close_fp32(stream(model, inputs)[0], without)


@torch.no_grad()
def test_compiles_whole():
    model = tiny_model(num_layers=1)
    inputs = inputs_of(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    assert_close_fp32(stream(compiled, inputs)[0], stream(model, inputs)[0])
    torch._dynamo.reset()


@torch.no_grad()
def test_wrong_states():
    model = tiny_model()
    inputs = inputs_of(model)
    state = stream(model, inputs)[1]
    with pytest.raises(ValueError, match=r"`state` must be of 1 videos with frames of \[3, 2\] tokens.*got 2"):
        model(**{name: value[:1] for name, value in inputs.items()}, state=state)
    with pytest.raises(ValueError, match="one entry for each of the 1 blocks, got 3"):
        tiny_model(num_layers=1)(**inputs, state=state)
    with pytest.raises(ValueError, match=r"at most 32 tokens.*earlier frames included, got \(33, 3, 2\)"):
        model(**inputs, state=state._replace(frames=25))
    with pytest.raises(ValueError, match=r"and 40 frames .`most` of the state.*got \(41, 3, 2\)"):
        model(**inputs, state=state._replace(frames=33, most=40))
    output = model(**inputs, state=state._replace(frames=25, most=40))
    assert (output.state.frames, output.state.most) == (33, 40)
    with pytest.raises(ValueError, match="`state` cannot be used together with `controlnet_block_samples`"):
        model(**inputs, state=state, controlnet_block_samples=tuple(torch.randn(1, 2, 48, 32)))
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="`state` cannot be used together with a step cache"):
        model(**inputs, state=state)
