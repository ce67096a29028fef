"""Layers whose codes are in a rotated basis: their output, their file, and adapters beside them."""

import json

import pytest
import torch

import diffusers_sana
from diffusers_sana import SVDQuantConfig, quantize, set_compute_mode
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose, relative_error
from diffusers_sana.quantizers.svdquant.config import LayerConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLinear, quantized_layers
from tests.quantizers import tiny_models


def spiky(tokens, features):
    """Inputs of which few are large, in all channels, so that smoothing cannot help."""
    return torch.distributions.StudentT(2.0).sample((tokens, features)).clamp(-50, 50)


def test_auto_rotates_where_it_lowers_the_error():
    weight, x = torch.randn(96, 100), spiky(256, 100)
    config = {name: LayerConfig(rank=8, rotation=name) for name in ("none", "auto", "hadamard")}
    results = {name: decompose([weight], item, inputs=x) for name, item in config.items()}
    errors = {name: reports[0].error for name, (_, reports) in results.items()}
    assert errors["auto"] == errors["hadamard"] < 0.8 * errors["none"]
    assert results["auto"][1][0].rotated
    assert results["none"][0][0].rotation is None
    sparse = torch.zeros(96, 128)  # one weight per group: exact without rotation
    sparse[:, ::64] = torch.randn(96, 2)
    (item,), (report,) = decompose([sparse], LayerConfig(rank=0, rotation="auto", mode="w4a16"))
    assert not report.rotated
    assert item.rotation is None


@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
@pytest.mark.parametrize("gptq", [False, True])
def test_layer_computes_what_was_fitted(mode, gptq):
    weight, x = torch.randn(96, 100), spiky(256, 100)
    config = LayerConfig(rank=8, rotation="hadamard", mode=mode, gptq=gptq)
    (item,), (report,) = decompose([weight], config, inputs=x, hessian=x.t() @ x)
    assert report.error == pytest.approx(relative_error(item, weight, x, mode))
    assert report.error < 0.15
    layer = SVDQuantLinear(item, compute_mode=mode)
    expected = item.output(x, mode)
    assert (layer(x) - expected).norm() < 0.03 * expected.norm()
    assert (x @ layer.dequantize().t() - item.output(x, "w4a16")).norm() < 1e-4 * expected.norm()
    assert torch.equal(layer.dequantize(rows=slice(0, None, 3)), layer.dequantize()[::3])


def test_file_and_adapters(tmp_path):
    model, inputs = tiny_models.sana()
    report = quantize(model, SVDQuantConfig(rank=4, rotation="hadamard"), progress=False)
    assert {layer.rotated for layer in report.layers} == {True, False}  # not where activations stay in 16 bit
    rotated = [layer.rotation is not None for layer in quantized_layers(model)]
    model.save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert recorded["layout"] == "diffusers_sana/2"
    assert recorded["rotated"]
    loaded = diffusers_sana.SanaTransformer2DModel.from_pretrained(tmp_path)
    assert [layer.rotation is not None for layer in quantized_layers(loaded)] == rotated
    state, again = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)

    name = next(name for name, layer in loaded.named_modules() if getattr(layer, "rotation", None) is not None)
    layer = loaded.get_submodule(name)
    assert torch.equal(again[f"{name}.weight"].clone(), layer.dequantize())  # FLUX's LoRA loader looks it up
    before = layer.dequantize()
    change = torch.outer(torch.randn(len(before)), torch.randn(before.shape[1]))
    layer.add_to_weight(change)
    assert (layer.dequantize() - before - change).norm() < 1e-2 * change.norm()
    set_compute_mode(loaded, "w4a4")
    assert loaded(**inputs).sample.isfinite().all()


def test_models_without_rotated_layers_stay_in_the_first_layout(tmp_path):
    model, _ = tiny_models.sana()
    quantize(model, SVDQuantConfig(rank=4, refinements=0, smoothing="none"), progress=False)
    model.save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert recorded["layout"] == "diffusers_sana/1"
    assert not recorded["rotated"]
