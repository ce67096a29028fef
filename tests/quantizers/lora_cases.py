"""Quantized models, their dense twins, and LoRA files for both: shared by the tests of adapters."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffusers_sana.quantizers.svdquant.api import quantize
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantConv2d, quantized_layers
from tests.numerics import assert_close_fp32, relative_error


RANK = 4


def quantized(model: nn.Module, **options) -> nn.Module:
    """The model itself, its layers replaced; w4a16, so that nothing but the weight differs from a dense layer."""
    config = SVDQuantConfig(**{"rank": RANK, "compute_mode": "w4a16", "smoothing": "none", **options})
    quantize(model, config, progress=False)
    return model


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy with stock layers that have the weights which the quantized ones stand for."""
    twin = copy.deepcopy(model)
    twin.is_quantized = False
    del twin.hf_quantizer
    for name, layer in layers_by_name(twin):
        stock = nn.Conv2d if isinstance(layer, SVDQuantConv2d) else nn.Linear
        kernel = (1,) if stock is nn.Conv2d else ()
        plain = stock(layer.weight.shape[1], layer.weight.shape[0], *kernel, bias=layer.bias is not None)
        plain.weight.data = layer.weight.clone()
        if layer.bias is not None:
            plain.bias.data = layer.bias.data
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, plain.requires_grad_(False))
    return twin


def layers_by_name(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    layers = set(quantized_layers(model))
    return ((name, module) for name, module in list(model.named_modules()) if module in layers)


def lora_file(model: nn.Module, seed: int, rank: int = 3, pick: str = "", scale: float = 0.3) -> dict[str, Tensor]:
    """A state dict as PEFT writes it, for the quantized layers with `pick` in their names."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for name, layer in layers_by_name(model):
        if pick in name:
            ones = (1,) * (layer.weight.ndim - 2)
            outputs, inputs = layer.weight.shape[:2]
            name = name.removesuffix(".base_layer")  # where an adapter is already
            state_dict[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, *ones, generator=generator) * scale
            state_dict[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, *ones, generator=generator) * scale
    return state_dict


def prefixed(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in the files that pipelines load."""
    return {f"transformer.{name}": tensor for name, tensor in state_dict.items()}


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).sample


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)) for name, tensor in actual.items()
    )


def check_lora_beside_and_fused(model: nn.Module, inputs: dict, bound: float) -> None:
    """A LoRA on 8-bit layers: nearer than `bound` to that of the dense twin, the same when fused, then gone."""
    base, before = run(model, inputs), bits(model)
    twin, file = dense_twin(model), lora_file(model, 1)
    for each in (model, twin):
        each.load_lora_adapter(file, prefix=None, adapter_name="one")
    beside = run(model, inputs)
    assert relative_error(beside, base) > 0.05
    assert relative_error(beside, run(twin, inputs)) < bound
    model.fuse_lora()
    assert model.transformer_blocks[0].attn1.to_q.base_layer.rank == 3
    assert_close_fp32(run(model, inputs), beside)
    model.unfuse_lora()
    model.unload_lora()
    assert same_bits(bits(model), before)
    assert torch.equal(run(model, inputs), base)
