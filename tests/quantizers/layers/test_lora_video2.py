"""Adapters on a quantized SANA-Video 2.0, whose layers have the names of the authors' checkpoints."""

import pytest
import torch

from diffusers_sana import FlowDPMSolverScheduler, SanaVideo2Pipeline
from diffusers_sana.loaders.lora.any_model import load_adapter
from tests import tiny, tiny_video
from tests.numerics import assert_close_fp32, relative_error
from tests.quantizers import tiny_models
from tests.quantizers.lora_cases import bits, dense_twin, lora_file, prefixed, quantized, run, same_bits


@pytest.fixture(scope="module")
def case():
    """The quantized model, its dense twin, and inputs. Each test leaves them as they were."""
    model, inputs = tiny_models.sana_video2()
    model = quantized(model)
    return model, dense_twin(model), inputs


def pipeline_with(model):
    others = tiny.tokenizer(), tiny.text_encoder(), tiny_video.ltx_vae()
    return SanaVideo2Pipeline(*others, model, FlowDPMSolverScheduler())


def as_kohya(file):
    """Names with underscores, and factors as kohya's scripts call them."""
    parts = {"lora_A": "lora_down", "lora_B": "lora_up"}
    renamed = {}
    for key, tensor in file.items():
        layer, part, end = key.rsplit(".", 2)
        renamed[f"lora_transformer_{layer.replace('.', '_')}.{parts[part]}.{end}"] = tensor
    return renamed


@pytest.mark.parametrize("written", [prefixed, as_kohya], ids=["diffusers", "kohya"])
def test_files_of_pipelines(case, written):
    model, twin, inputs = case
    base, before, file = run(model, inputs), bits(model), lora_file(model, seed=1)
    pipes = [pipeline_with(each) for each in (model, twin)]
    for pipe in pipes:
        pipe.load_lora_weights(written(file), adapter_name="style")
        pipe.set_adapters("style", 0.5)
    beside = run(model, inputs)
    assert_close_fp32(beside, run(twin, inputs))
    assert relative_error(beside, base) > 1e-2
    pipes[0].fuse_lora()
    assert_close_fp32(run(model, inputs), beside)
    pipes[0].unfuse_lora()
    for pipe in pipes:
        pipe.unload_lora_weights()
    assert torch.equal(run(model, inputs), base)
    assert same_bits(bits(model), before)


def test_files_for_the_model_alone(case):
    model, twin, inputs = case
    for each in (model, twin):
        load_adapter(each, prefixed(lora_file(model, seed=2, pick="mlp")), "style")
    assert_close_fp32(run(model, inputs), run(twin, inputs))
    for each in (model, twin):
        each.unload_lora()


def test_a_lora_of_another_model(case):
    file = {f"transformer.transformer_blocks.0.attn1.to_q.lora_{x}.weight": torch.zeros(1, 1) for x in "AB"}
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn1\.to_q.* is not a layer of SANA-Video 2\.0"):
        pipeline_with(case[0]).load_lora_weights(file)
