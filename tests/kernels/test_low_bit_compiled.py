"""Every low-bit operation and every mode of a quantized layer, compiled by Inductor for the CPU, against eager.

The widths are not whole numbers of groups: Inductor once left the last columns of such weights unwritten.
"""

import copy

import pytest
import torch

from diffusers_sana.kernels.cpu import int8_linear
from diffusers_sana.kernels.dequantize_weight import dequantize_weight
from diffusers_sana.kernels.lowbit_linear import lowbit_linear
from diffusers_sana.kernels.quantize_lowrank import quantize_lowrank
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.config import LayerConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLinear
from tests.numerics import relative_error


FEATURES = 72  # neither a multiple of 64 nor of 16
OUTPUTS, TOKENS = 32, 5


def quantized_layer(precision: str, mode: str, rank: int = 4) -> SVDQuantLinear:
    (weight,), _ = decompose([torch.randn(OUTPUTS, FEATURES)], LayerConfig(precision, rank, smoothing="none"))
    return SVDQuantLinear(weight, torch.randn(OUTPUTS), mode)


def in_int8(layer: SVDQuantLinear, x: torch.Tensor) -> torch.Tensor:
    """What GPUs compute in w4a8; on a CPU another operation does."""
    codes = quantize_lowrank(x, layer.smooth_factor, layer.proj_down, "int8")
    weight = (layer.qweight, layer.wscales, layer.wtscale, layer.proj_up, layer.bias)
    return lowbit_linear(*codes, *weight, activation_format="int8")


@torch.no_grad()
def test_compiled_is_eager():
    layers = torch.nn.ModuleDict()
    for precision in ("int4", "nvfp4", "int8"):
        layers[f"{precision} w4a16"] = quantized_layer(precision, "w4a16")
        for mode in ("w4a4", "w4a8"):
            layers[f"{precision} {mode}"] = copy.deepcopy(layers[f"{precision} w4a16"])
            layers[f"{precision} {mode}"].set_compute_mode(mode)
    without_branch = quantized_layer("int4", "w4a16", rank=0)
    x = torch.randn(TOKENS, FEATURES)

    def outputs() -> dict[str, torch.Tensor]:
        results = {name: layer(x) for name, layer in layers.items()}
        for precision in ("int4", "nvfp4", "int8"):
            results[f"{precision}, in int8"] = in_int8(layers[f"{precision} w4a16"], x)
        weight = without_branch.qweight, without_branch.wscales, without_branch.wtscale
        branch = without_branch.smooth_factor, without_branch.proj_down, without_branch.proj_up
        results["weight without a branch"] = dequantize_weight(*weight, *branch, torch.float32)
        return results

    expected = outputs()
    torch._dynamo.reset()
    actual = torch.compile(outputs, fullgraph=True)()
    torch._dynamo.reset()
    errors = {name: relative_error(actual[name], value) for name, value in expected.items()}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.skipif(not int8_linear.is_supported(), reason="this processor has no 8-bit product in PyTorch")
@pytest.mark.parametrize("precision", ["int4", "int8"])
@torch.no_grad()
def test_compiled_8_bit_product_has_the_bits_of_eager(monkeypatch, precision):
    """Any other arithmetic has others. The 8-bit copy of the weight is made once, and serves both."""
    calls, prepare = [], int8_linear.prepare
    monkeypatch.setattr(int8_linear, "prepare", lambda *parts: calls.append(parts) or prepare(*parts))
    layer, x = quantized_layer(precision, "auto").bfloat16(), torch.randn(2, TOKENS, FEATURES).bfloat16()
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x), expected)
    assert len(calls) == 1
    layer.bias.add_(1)
    assert torch.equal(compiled(x), layer(x))
    assert len(calls) == 2
    torch._dynamo.reset()
