"""float8 weights, which files of other runtimes have: layers, adapters, and what is saved."""

import json

import pytest
import torch

from diffusers_sana import SVDQuantConfig, quantize, set_compute_mode
from diffusers_sana.kernels import float8_linear as module
from diffusers_sana.kernels.low_bit import pad_features
from diffusers_sana.kernels.rotation import rotate, rotation_tensor
from diffusers_sana.loaders.quantized.layer import UnpackedLayer
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLinear, quantized_layers
from tests.loaders.quantized.tiny_models import float8
from tests.numerics import assert_close_fp32
from tests.numerics import relative_error as distance
from tests.quantizers import tiny_models
from tests.quantizers.lora_cases import bits, check_lora_beside_and_fused, run, same_bits


CPU = torch.device("cpu")
N, K, R = 48, 100, 3


def layer_of(mode, rotation=None, outputs=N, features=K):
    codes = (100 * torch.randn(outputs, features)).clamp(-448, 448).to(torch.float8_e4m3fn)
    item = UnpackedLayer(
        codes.view(torch.uint8), 0.5 + torch.rand(outputs), None, 0.5 + torch.rand(features),
        torch.randn(R, features), torch.randn(outputs, R), torch.randn(outputs), rotation=rotation,
    )  # fmt: skip
    return SVDQuantLinear(item.to_quantized_weight(torch.float32), item.bias, mode)


def test_modes():
    layer = layer_of("auto")
    assert (layer.precision, layer.mode_on(CPU)) == ("float8", "f8a16")
    modes = {"w8a8": "f8a8", "w4a4": "f8a8", "w8a16": "f8a16", "w4a16": "f8a16"}
    for mode, expected in modes.items():
        layer.set_compute_mode(mode)
        assert layer.mode_on(CPU) == expected
    x = torch.randn(7, K)
    assert_close_fp32(layer(x), x.double() @ layer.dequantize(torch.float64).t() + layer.bias.double())


@pytest.mark.parametrize("product", ["reference", "of PyTorch"])
@pytest.mark.parametrize("rotation", [None, 64])
def test_f8a8_is_its_formula(rotation, product, monkeypatch):
    """Per-token scales of the input and per-row scales of the weight, around a product of e4m3 numbers."""
    calls, original = [], module._product
    monkeypatch.setattr(module, "_product", lambda *parts: calls.append(1) or original(*parts))
    monkeypatch.setattr(module, "has_product", lambda device: product == "of PyTorch")
    features = 128 if rotation else K
    layer, x = (
        layer_of("w8a8", rotation, features=features),
        torch.randn(7, features) * torch.logspace(-3, 3, 7)[:, None],
    )
    x[2] = 0
    smoothed = pad_features(x / layer.smooth_factor)
    smoothed = smoothed if rotation is None else rotate(smoothed, rotation_tensor(rotation))
    tokens = smoothed.abs().amax(1, keepdim=True) / 448
    codes = (smoothed / tokens.clamp(min=1e-30)).to(torch.float8_e4m3fn).double()
    weight = layer.qweight.view(torch.float8_e4m3fn).double() * layer.wscales.double()[:, None]
    exact = (codes @ weight.t()) * tokens + x.double() @ layer.proj_down.double().t() @ layer.proj_up.double().t()
    assert distance(layer(x), exact + layer.bias) < 1e-3  # numbers that the reciprocal moves over a step
    assert len(calls) == (product == "of PyTorch")
    assert 0.005 < distance(layer(x), x @ layer.dequantize().t() + layer.bias) < 0.05
    assert layer(x[:0]).shape == (0, N)


def test_odd_sides_have_no_product(monkeypatch):
    """cuBLAS needs multiples of 16 output features."""
    monkeypatch.setattr(module, "has_product", lambda device: True)
    monkeypatch.setattr(module, "_product", lambda *parts: pytest.fail("called"))
    layer, x = layer_of("w8a8", outputs=10), torch.randn(4, K)
    assert distance(layer(x), x @ layer.dequantize().t() + layer.bias) < 0.05


def test_gradient_reaches_the_input():
    layer, x = layer_of("w8a8"), torch.randn(3, K, requires_grad=True)
    layer(x).sum().backward()
    assert_close_fp32(x.grad, layer.dequantize(torch.float64).sum(0).expand(3, K))


@pytest.fixture
def sana(tmp_path):
    model, inputs = tiny_models.sana()
    return float8(model, tmp_path, dtype=torch.float32), inputs


@pytest.mark.parametrize("compute_mode", ["w8a16", "w8a8"])
def test_lora_beside_and_fused(compute_mode, sana):
    model, inputs = sana
    set_compute_mode(model, compute_mode)
    check_lora_beside_and_fused(model, inputs, 1e-5 if compute_mode == "w8a16" else 0.05)


def test_saved_in_our_layout(sana, tmp_path):
    model, inputs = sana
    model.save_pretrained(tmp_path / "ours")
    recorded = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert (recorded["layout"], recorded["precision"]) == ("diffusers_sana/4", "float8")
    assert set(recorded["modules"].values()) == {"f8a8", "f8a16"}
    again = type(model).from_pretrained(tmp_path / "ours")
    assert same_bits(bits(again), bits(model))
    assert torch.equal(run(again, inputs), run(model, inputs))
    half = type(model).from_pretrained(tmp_path / "ours", dtype=torch.float16)
    half.transformer_blocks.to(torch.bfloat16)
    for layer, other in zip(*(quantized_layers(item.transformer_blocks) for item in (half, model)), strict=True):
        assert layer.proj_up.dtype == torch.bfloat16
        assert torch.equal(layer.qweight, other.qweight)
        assert torch.equal(layer.wscales, other.wscales)
    layer = model.transformer_blocks[0].attn1.to_q
    layer.qweight = torch.nn.Parameter(layer.qweight.view(torch.int8), requires_grad=False)
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"attn1.to_q.qweight' must be torch.uint8 of shape"):
        type(model).from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize("mode", ["w8a8", "w8a16"])
def test_compiled_as_a_whole(mode):
    layer, x = layer_of(mode), torch.randn(5, K)
    torch._dynamo.reset()
    with torch.no_grad():
        assert distance(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x)) < 1e-6


def test_no_weight_is_quantized_to_it():
    with pytest.raises(ValueError, match=r"`precision` must be one of .* to quantize a model, got 'float8'"):
        SVDQuantConfig(precision="float8")
    model, _ = tiny_models.sana()
    with pytest.raises(ValueError, match="float8 layers are only read from files"):
        quantize(model, SVDQuantConfig(modules={"*.attn1.to_q": "f8a8"}), progress=False)
