"""`torch.compile`: whole graphs, one graph for all sizes, block by block; adapters."""

import pytest
import torch
from peft import LoraConfig
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_sana import AutoencoderDC, SanaTransformer2DModel
from diffusers_sana.kernels.dispatch import kernel_mode
from tests.models.autoencoder_dc_cases import batch_norm_tail, image, layout
from tests.models.sana_transformers import tiny_inputs, tiny_model
from tests.numerics import assert_close_fp32


SIZES = [(6, 7), (7, 6), (9, 11)]  # unlike the number of channels and of text tokens: equal sizes share a symbol
# Autoencoders with one block of each kind: to trace one at sizes that are symbols takes seconds.
WIDTHS = (8, 8, 16, 16)
OPTIONS = {"attention": "ed", "latent_channels": 8, "attention_head_dim": 8}
AUTOENCODERS = {
    "sana": layout(
        WIDTHS,
        (1, 1, 1, 1),
        (1, 1, 1, 1),
        scales=(5,),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        **OPTIONS,
    ),
    "in": layout(WIDTHS, (0, 1, 1, 1), (0, 1, 1, 1), **OPTIONS, **batch_norm_tail(4)),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def context(model: SanaTransformer2DModel):
    inputs = tiny_inputs(model)
    return model.encode_text(inputs["encoder_hidden_states"], inputs.get("encoder_attention_mask"))


@pytest.mark.parametrize("mode", ["torch", "triton"])
@torch.no_grad()
def test_transformer_one_graph_for_all_sizes(mode):
    """Against the reference implementation, because the interpreter of Triton takes seconds a step."""
    model = tiny_model(num_layers=1)
    text = context(model)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for height, width in SIZES:
        latents = torch.randn(text.batch_size, model.config.in_channels, height, width)
        arguments = {"timestep": torch.full((text.batch_size,), 500.0), "text_context": text}
        with kernel_mode(mode):
            actual = compiled(latents, None, **arguments).sample
        with kernel_mode("torch"):
            expected = model(latents, None, **arguments).sample
        assert_close_fp32(actual, expected)
    assert counter.frame_count == 1


@torch.no_grad()
def test_transformer_settles_by_itself():
    """Without `dynamic=True` the second size makes the graph general; the third needs no other."""
    model = tiny_model()
    text = context(model)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for height, width in [(6, 7), (7, 6), (9, 11), (13, 8)]:
        latents = torch.randn(text.batch_size, model.config.in_channels, height, width)
        compiled(latents, None, timestep=torch.full((text.batch_size,), 500.0), text_context=text)
    assert counter.frame_count <= 3  # one static, and at most one more for each side


@torch.no_grad()
def test_transformer_block_by_block():
    model = tiny_model()
    text, inputs = context(model), tiny_inputs(model)
    arguments = (inputs["hidden_states"], None, inputs["timestep"])
    expected = model(*arguments, text_context=text).sample
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert_close_fp32(model(*arguments, text_context=text).sample, expected)
    assert counter.frame_count == 1  # one block's code serves all


@torch.no_grad()
def test_transformer_with_an_adapter():
    model = tiny_model()
    inputs = tiny_inputs(model)
    plain = model(**inputs).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv_point"], init_lora_weights=False))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    actual = compiled(**inputs).sample
    assert_close_fp32(actual, model(**inputs).sample)
    assert not torch.allclose(actual, plain)


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_autoencoder_one_graph_for_all_sizes(name):
    model = AutoencoderDC(**AUTOENCODERS[name]).eval()
    counter = CompileCounterWithBackend("eager")
    decoder = torch.compile(model.decoder, backend=counter, fullgraph=True, dynamic=True)
    encoder = torch.compile(model.encoder, backend=counter, fullgraph=True, dynamic=True)
    for size in [(56, 48), (48, 64), (56, 56)]:
        x = image(1, *size).contiguous(memory_format=torch.channels_last)
        z = model.encoder(x)
        assert_close_fp32(encoder(x), z)
        assert_close_fp32(decoder(z), model.decoder(z))
    assert counter.frame_count == 2
