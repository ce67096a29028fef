"""int8 weights: layers, whole models and parts of them, adapters, and what is saved."""

import json

import pytest
import torch

import diffusers_sana
from diffusers_sana import SVDQuantConfig, export_quantized, quantize, set_compute_mode
from diffusers_sana.kernels.low_bit import decode_weight, pad_features
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose, relative_error
from diffusers_sana.quantizers.svdquant.config import LayerConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLinear, quantized_layers
from diffusers_sana.quantizers.svdquant.targets import find_targets
from tests import tiny
from tests.numerics import assert_close_fp32
from tests.numerics import relative_error as distance
from tests.quantizers import tiny_models
from tests.quantizers.lora_cases import bits, check_lora_beside_and_fused, same_bits


INT8 = SVDQuantConfig(precision="int8")
CPU = torch.device("cpu")


def scales_are_fp32(model):
    layers = [layer for layer in quantized_layers(model) if layer.precision == "int8"]
    assert layers
    assert {(layer.qweight.dtype, layer.wscales.dtype) for layer in layers} == {(torch.int8, torch.float32)}


@pytest.mark.parametrize("mode", ["w8a8", "w8a16"])
@pytest.mark.parametrize(("rank", "rotation"), [(0, "none"), (8, "none"), (0, "hadamard")])
def test_layer(mode, rank, rotation):
    weight, x = torch.randn(96, 100), torch.randn(64, 100)
    config = LayerConfig("int8", rank, rotation=rotation, mode=mode)
    (item,), (report,) = decompose([weight], config, inputs=x)
    assert (item.qweight.shape, item.wscales.shape) == ((96, 128), (96,))
    assert report.error == pytest.approx(relative_error(item, weight, x, mode))
    assert report.error < (0.008 if mode == "w8a16" else 0.015)
    layer = SVDQuantLinear(item, torch.randn(96), mode)
    assert (layer.precision, layer.rank, layer.mode_on(CPU)) == ("int8", rank, mode)
    exact = x @ weight.t() + layer.bias
    assert distance(layer(x), exact) < 0.02  # processors without VNNI have 63 levels
    assert distance(x @ layer.weight.t() + layer.bias, exact) < 0.008


def test_w8a8_is_its_formula():
    """Per-token scales of the input and per-row scales of the weight, around a product of integers."""
    weight, x = torch.randn(24, 64), torch.randn(7, 64) * torch.logspace(-3, 3, 7)[:, None]
    (item,), _ = decompose([weight], LayerConfig("int8", 0, smoothing="none", mode="w8a8"))
    assert torch.equal(item.smooth_factor, torch.ones(64))
    tokens, rows = x.abs().amax(1, keepdim=True) / 127, weight.abs().amax(1) / 127
    assert torch.equal(item.wscales, rows)
    codes = (weight / rows[:, None]).round()
    assert torch.equal(item.qweight.float(), codes)
    expected = ((x / tokens).round() @ codes.t()) * tokens * rows
    assert_close_fp32(item.output(x, "w8a8"), expected.double())


def test_calibration_and_error_compensation_lower_the_error():
    x = torch.randn(512, 64) @ torch.randn(64, 64)
    weight = torch.randn(48, 64)
    errors = {}
    for gptq in (False, True):
        config = LayerConfig("int8", 0, smoothing="none", gptq=gptq, mode="w8a16")
        _, (report,) = decompose([weight], config, inputs=x, hessian=x.t() @ x)
        errors[gptq] = report.error
    assert errors[True] < 0.9 * errors[False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_model(dtype, tmp_path):
    model, inputs = tiny_models.sana()
    expected = tiny_models.output(model, inputs)
    model.save_pretrained(tmp_path / "original")
    load = type(model).from_pretrained
    on_the_way = load(tmp_path / "original", quantization_config=INT8, dtype=dtype)
    model.to(dtype)
    report = quantize(model, INT8, progress=False)
    assert {layer.precision for layer in quantized_layers(model)} == {"int8"}
    assert {layer.mode for layer in report.layers} == {"w8a8", "w8a16"}
    assert str(report).startswith(f"{len(report.layers)} layers in int8, rank 0, no prompts")
    stored = sum(p.nbytes for layer in quantized_layers(model) for n, p in layer.named_parameters() if n != "bias")
    assert sum(layer.bytes for layer in report.layers) == stored
    result = tiny_models.output(model, inputs, dtype)
    assert distance(result, expected) < 0.02
    scales_are_fp32(model)
    scales_are_fp32(on_the_way)
    assert distance(tiny_models.output(on_the_way, inputs, dtype), expected) < 0.02

    model.save_pretrained(tmp_path / "quantized")
    recorded = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert (recorded["layout"], set(recorded["modules"].values())) == ("diffusers_sana/3", {"w8a8", "w8a16"})
    again = load(tmp_path / "quantized")
    scales_are_fp32(again)
    assert same_bits(bits(again), bits(model))
    assert torch.equal(tiny_models.output(again, inputs, dtype), result)
    scales_are_fp32(load(tmp_path / "quantized", dtype=torch.float16))
    again.transformer_blocks.to(torch.float16)
    scales_are_fp32(again)
    assert {layer.proj_up.dtype for layer in quantized_layers(again.transformer_blocks)} == {torch.float16}


def test_modes_of_a_model():
    model, inputs = tiny_models.sana()
    exact = tiny_models.output(model, inputs)
    quantize(model, SVDQuantConfig(precision="int8", compute_mode="w8a8"), progress=False)
    errors = {}
    for mode in ("w8a8", "w4a4", "w8a16"):
        set_compute_mode(model, mode)
        modes = {layer.mode_on(CPU) for layer in quantized_layers(model)}
        assert modes == {"w8a16" if mode == "w8a16" else "w8a8", "w8a16"}
        errors[mode] = distance(tiny_models.output(model, inputs), exact)
    assert errors["w8a16"] < errors["w8a8"] == errors["w4a4"] < 0.02


def test_some_layers_of_a_model(tmp_path):
    model, inputs = tiny_models.sana()
    expected = tiny_models.output(model, inputs)
    modules = {"transformer_blocks.*.attn1.*": "w8a8", "transformer_blocks.*.ff.*": "w4a4"}
    config = SVDQuantConfig(precision="nvfp4", rank=4, modules=modules)
    report = quantize(model, config, progress=False)
    assert {(layer.mode, layer.precision) for layer in report.layers} == {("w8a8", "int8"), ("w4a4", "nvfp4")}
    assert "layers in int8" in str(report)
    assert "layers in nvfp4" in str(report)
    attention, feed_forward = model.transformer_blocks[0].attn1.to_q, model.transformer_blocks[0].ff.conv_inverted
    assert (attention.precision, feed_forward.precision, attention.rank) == ("int8", "nvfp4", 4)
    result = tiny_models.output(model, inputs)
    assert distance(result, expected) < 0.1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert same_bits(bits(again), bits(model))
    assert torch.equal(tiny_models.output(again, inputs), result)


def test_targets_that_a_user_names_are_taken_as_they_are():
    model, _ = tiny_models.sana()
    named = SVDQuantConfig(precision="int8", rank=4, modules={"*.to_q": "w4a4"})
    assert set(find_targets(model, named).values()) == {"w4a4"}
    assert set(find_targets(tiny.text_encoder(), INT8).values()) == {"w8a16"}


def test_text_encoder(tmp_path):
    model = tiny.text_encoder()
    model.save_pretrained(tmp_path / "original")
    load = type(model).from_pretrained
    quantized = load(tmp_path / "original", quantization_config=INT8, dtype=torch.bfloat16)
    scales_are_fp32(quantized)
    quantized.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized")
    assert same_bits(bits(again), bits(quantized))
    ids = torch.tensor([[1, 5, 9]])
    assert distance(again(ids).last_hidden_state, model(ids).last_hidden_state) < 0.05


@pytest.mark.parametrize("compute_mode", ["w8a16", "w8a8"])
def test_lora_beside_and_fused(compute_mode):
    model, inputs = tiny_models.sana()
    quantize(model, SVDQuantConfig(precision="int8", compute_mode=compute_mode), progress=False)
    check_lora_beside_and_fused(model, inputs, 1e-5 if compute_mode == "w8a16" else 0.02)


def test_gradient_reaches_the_input():
    (item,), _ = decompose([torch.randn(16, 64)], LayerConfig("int8", 0))
    layer, x = SVDQuantLinear(item), torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert_close_fp32(x.grad, layer.dequantize(torch.float64).sum(0).expand(3, 64))


def test_compiled_as_a_whole():
    model, inputs = tiny_models.sana(num_layers=1)
    quantize(model, INT8, progress=False)
    expected = tiny_models.output(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert distance(tiny_models.output(compiled, inputs), expected) < 1e-6
    torch._dynamo.reset()


def test_padding_is_zero():
    (item,), _ = decompose([torch.randn(8, 70)], LayerConfig("int8", 2))
    decoded = decode_weight(item.qweight, item.wscales, None)
    assert torch.equal(decoded, pad_features(item.residual()))


def test_broken_files_are_refused(tmp_path):
    model, _ = tiny_models.sana()
    quantize(model, INT8, progress=False)
    name = "transformer_blocks.0.attn1.to_q"
    layer = model.get_submodule(name)
    layer.wscales = torch.nn.Parameter(layer.wscales[:-1], requires_grad=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"'{name}.wscales' must be torch.float32 of shape"):
        diffusers_sana.SanaTransformer2DModel.from_pretrained(tmp_path)


def test_formats_without_int8_refuse_it(tmp_path):
    model, _ = tiny_models.sana()
    quantize(model.to(torch.bfloat16), INT8, progress=False)
    with pytest.raises(ValueError, match=r"cannot hold \d+ layers as they are, .* needs int4"):
        export_quantized(model, tmp_path / "out", "cache-dit")
