"""Ranks and precisions under a budget of bytes."""

import pytest
import torch

import diffusers_sana
from diffusers_sana import SVDQuantConfig, quantize
from diffusers_sana.quantizers.svdquant.budget import Option, bf16_bytes, choose
from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layers
from tests.quantizers import tiny_models


def test_the_upgrade_that_helps_most_per_byte_comes_first():
    options = {
        "a": [Option(100, 0.0), Option(10, 1.0), Option(20, 0.5)],
        "b": [Option(100, 0.0), Option(10, 0.1), Option(20, 0.09)],
    }
    sizes = {
        most: {key: option.bytes for key, option in choose(options, 5, most).items()} for most in (25, 35, 45, 500)
    }
    assert sizes == {
        25: {"a": 10, "b": 10},
        35: {"a": 20, "b": 10},
        45: {"a": 20, "b": 20},
        500: {"a": 100, "b": 100},
    }
    with pytest.raises(ValueError, match=r"`budget` must leave room for 25 bytes, .* got 24 bytes"):
        choose(options, 5, 24)


def test_a_model_under_a_budget(tmp_path):
    width = {"attention_head_dim": 8, "cross_attention_head_dim": 8, "cross_attention_dim": 128}
    model, _ = tiny_models.sana(num_attention_heads=16, num_cross_attention_heads=16, num_layers=1, **width)
    model.to(torch.bfloat16)
    name = "transformer_blocks.0.attn1.to_out.0"  # a weight for which a branch pays
    model.get_submodule(name).weight.data += (torch.randn(128, 6) @ torch.randn(6, 128)).bfloat16()
    before = bf16_bytes([model])
    report = quantize(
        model, SVDQuantConfig(budget="0.45x", refinements=0, smoothing="none", compute_mode="w4a16"), progress=False
    )
    after = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert 0.42 * before < after <= 0.45 * before
    ranks = [layer.rank for layer in quantized_layers(model)]
    assert ranks == [layer.rank for layer in report.layers]
    assert {layer.precision for layer in quantized_layers(model)} == {"int4", "int8"}
    assert [layer.precision for layer in quantized_layers(model)] == [layer.precision for layer in report.layers]
    assert model.get_submodule(name).precision == "int8" or model.get_submodule(name).rank >= 8
    assert "within 0.45x" in str(report)
    assert "layers in int8" in str(report)
    assert report.config.modules
    model.save_pretrained(tmp_path)
    loaded = diffusers_sana.SanaTransformer2DModel.from_pretrained(tmp_path)
    assert [layer.rank for layer in quantized_layers(loaded)] == ranks
    again = loaded.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_a_budget_that_is_too_small_changes_nothing():
    model, _ = tiny_models.sana()
    with pytest.raises(ValueError, match="`budget` must leave room"):
        quantize(model, SVDQuantConfig(budget="0.01x", refinements=0, smoothing="none"), progress=False)
    assert not any(True for _ in quantized_layers(model))
