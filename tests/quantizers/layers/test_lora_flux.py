"""Adapters on a quantized FLUX, a model of diffusers that knows nothing of us; its loader reads third-party files."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from peft import LoKrConfig

from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layers
from tests.numerics import assert_close_fp32, relative_error
from tests.quantizers import tiny_models
from tests.quantizers.lora_cases import RANK, bits, dense_twin, lora_file, prefixed, quantized, run, same_bits


@pytest.fixture
def case():
    """The quantized model, its dense twin, and inputs."""
    model, inputs = tiny_models.flux()
    model = quantized(model)
    return model, dense_twin(model), inputs


def pipeline_with(model):
    nothing = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **nothing)


def kohya_file(model, seed, rank=3):
    """As kohya's scripts write it: joint projections under other names, and a strength of `alpha / rank`."""
    generator = torch.Generator().manual_seed(seed)
    width = model.inner_dim
    shapes = {
        "double_blocks_0_img_attn_qkv": (3 * width, width),
        "double_blocks_0_txt_attn_proj": (width, width),
        "double_blocks_0_txt_mlp_0": (4 * width, width),
        "double_blocks_0_img_mod_lin": (6 * width, width),
        "single_blocks_0_linear2": (width, 5 * width),
        "single_blocks_0_modulation_lin": (3 * width, width),
    }
    file = {}
    for name, (outputs, inputs) in shapes.items():
        file[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, inputs, generator=generator) * 0.3
        file[f"lora_unet_{name}.lora_up.weight"] = torch.randn(outputs, rank, generator=generator) * 0.3
        file[f"lora_unet_{name}.alpha"] = torch.tensor(rank / 2)
    return file


def test_model(case):
    model, twin, inputs = case
    base, before = run(model, inputs), bits(model)
    for each in (model, twin):
        each.load_lora_adapter(lora_file(model, seed=1), prefix=None, adapter_name="first")
        each.load_lora_adapter(lora_file(model, seed=2, rank=2, pick="single"), prefix=None, adapter_name="second")
        each.set_adapters(["first", "second"], [0.3, -0.7])
    beside = run(model, inputs)
    assert_close_fp32(beside, run(twin, inputs))
    assert relative_error(beside, base) > 1e-2
    model.fuse_lora()
    assert_close_fp32(run(model, inputs), beside)
    model.unfuse_lora()
    model.unload_lora()
    assert torch.equal(run(model, inputs), base)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("writer", ["peft", "kohya"])
def test_pipeline(case, writer):
    model, twin, inputs = case
    base = run(model, inputs)

    def file(seed):
        return kohya_file(model, seed) if writer == "kohya" else prefixed(lora_file(model, seed))

    pipes = pipeline_with(model), pipeline_with(twin)

    def alike():
        output, expected = (run(pipe.transformer, inputs) for pipe in pipes)
        assert_close_fp32(output, expected)
        return output

    for pipe in pipes:
        pipe.load_lora_weights(file(1), adapter_name="first")
        pipe.load_lora_weights(file(2), adapter_name="second")  # around layers that have an adapter already
        pipe.set_adapters(["first", "second"], [0.5, 0.8])
    beside = alike()
    for pipe in pipes:
        pipe.fuse_lora(components=["transformer"], lora_scale=0.5, adapter_names=["first"])
    assert pipes[0].fused_loras == {"first"}
    assert {layer.rank for layer in quantized_layers(model)} == ({RANK, RANK + 3} if writer == "kohya" else {RANK + 3})
    assert relative_error(alike(), beside) > 1e-3
    for pipe in pipes:
        pipe.unfuse_lora(components=["transformer"])
        pipe.load_lora_weights(file(3), adapter_name="first", hotswap=True)
    assert relative_error(alike(), beside) > 1e-3
    pipes[0].unload_lora_weights()
    assert torch.equal(run(model, inputs), base)


def test_control_lora_widens_the_first_layer(case):
    """Its file has more input channels than the model; the layer is not quantized and grows."""
    model, twin, inputs = case
    file = lora_file(model, seed=1)
    file["x_embedder.lora_A.weight"] = torch.randn(3, 8)
    file["x_embedder.lora_B.weight"] = torch.randn(model.inner_dim, 3)
    outputs = []
    for each in (model, twin):
        pipeline_with(each).load_lora_weights(prefixed(file), adapter_name="control")
        outputs.append(run(each, {**inputs, "hidden_states": inputs["hidden_states"].repeat(1, 1, 2)}))
    assert_close_fp32(*outputs)


def test_lokr(case, caplog):
    """Kronecker products, whose rank is high: exact beside the layer, fused in part, which is said."""
    model, twin, inputs = case
    base = run(model, inputs)
    for each in (model, twin):
        torch.manual_seed(1)
        each.add_adapter(LoKrConfig(r=8, init_weights=False, target_modules=["to_q", "proj_mlp"]), "lokr")
    beside = run(model, inputs)
    assert_close_fp32(beside, run(twin, inputs))
    assert relative_error(beside, base) > 1e-3
    model.fuse_lora()
    assert "strongest ones are kept, which leaves out" in caplog.text
    fused = run(model, inputs)
    assert 1e-3 < relative_error(fused, beside) < relative_error(base, beside)
    model.unfuse_lora()
    assert_close_fp32(run(model, inputs), beside)
    model.unload_lora()
    assert_close_fp32(run(model, inputs), base)
