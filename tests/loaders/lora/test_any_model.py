"""`load_adapter` on models other than Sana: adapters of every kind on FLUX.1 and Qwen-Image, in 16 and 4 bits."""

import copy

import pytest
import torch

from diffusers_sana import load_adapter
from tests.loaders.lora.adapter_kinds import KINDS
from tests.numerics import assert_close_fp32
from tests.quantizers import tiny_models
from tests.quantizers.lora_cases import bits, dense_twin, quantized, same_bits
from tests.quantizers.tiny_models import output


LAYERS = {
    "flux": ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"),
    "qwen_image": ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.txt_mlp.net.2"),
}
# Original layers of FLUX.1, fused: the file has one adapter for several layers.
FUSED = {
    "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
    "single_blocks.0.linear1": [f"single_transformer_blocks.0.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v")]
    + ["single_transformer_blocks.0.proj_mlp"],
}


class Case:
    """A model, and one with plain layers of the same weights."""

    def __init__(self, family, is_quantized):
        self.model, self.inputs = tiny_models.FAMILIES[family]()
        self.twin = copy.deepcopy(self.model)
        if is_quantized:
            self.twin = dense_twin(quantized(self.model))
        self.before, self.bits = output(self.model, self.inputs), bits(self.model)

    def changed(self, weights):
        model = copy.deepcopy(self.twin)
        for name, weight in weights.items():
            model.get_submodule(name).weight.data = weight
        return output(model, self.inputs)


@pytest.fixture(scope="module", params=[(family, is_4) for family in LAYERS for is_4 in (False, True)])
def case(request):
    return Case(*request.param)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "scaled" not in kind and "bounded" not in kind])
def test_every_kind(case, kind):
    family = "flux" if hasattr(case.model, "single_transformer_blocks") else "qwen_image"
    file, weights = {}, {}
    for name, stem in zip(LAYERS[family], ("lycoris_{}", "transformer.{}"), strict=True):
        torch.manual_seed(0)
        tensors, weights[name] = KINDS[kind].make(case.twin.get_submodule(name).weight.detach())
        stem = stem.format(name.replace(".", "_") if "_{" in stem else name)
        file |= {f"{stem}.{ending}": tensor for ending, tensor in tensors.items()}
    assert load_adapter(case.model, file, "style") == "style"
    try:
        assert_close_fp32(output(case.model, case.inputs), case.changed(weights))
        case.model.disable_lora()
        assert torch.equal(output(case.model, case.inputs), case.before)
    finally:
        case.model.unload_lora()
    assert same_bits(bits(case.model), case.bits)


@pytest.mark.parametrize("kind", ["LoRA", "LoHa, high rank", "LoKr", "DoRA, outputs", "full", "OFT, outputs"])
def test_fused_layers_of_flux(kind):
    case = Case("flux", is_quantized=True)
    for original, names in FUSED.items():
        layers = [case.twin.get_submodule(name).weight.detach() for name in names]
        tensors, whole = KINDS[kind].make(torch.cat(layers))
        weights = dict(zip(names, whole.split([len(layer) for layer in layers]), strict=True))
        stem = f"lora_unet_{original.replace('.', '_')}"
        load_adapter(case.model, {f"{stem}.{ending}": tensor for ending, tensor in tensors.items()})
        assert_close_fp32(output(case.model, case.inputs), case.changed(weights))
        if kind == "LoRA":
            case.model.fuse_lora()
            assert_close_fp32(output(case.model, case.inputs), case.changed(weights))
            case.model.unfuse_lora()
        case.model.unload_lora()
        assert same_bits(bits(case.model), case.bits)


def test_refused(case, caplog):
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    ends = ("lora_A.weight", "lora_B.weight")

    def file(stem, *tensors):
        return {f"{stem}.{end}": tensor for end, tensor in zip(ends, tensors, strict=True)}

    layer = "transformer.transformer_blocks.0.attn.to_q"
    with pytest.raises(ValueError, match=r"'lora_unet_x.lora_A.weight' is not a layer of this \w+Transformer2DModel"):
        load_adapter(case.model, file("lora_unet_x", down, up))
    with pytest.raises(
        ValueError, match=r"to_q.lora_A.weight' must have size 32 in axis 1 .* got the shape \[2, 33\]"
    ):
        load_adapter(case.model, file(layer, torch.ones(2, 33), up))
    with pytest.raises(TypeError, match=r"`model` must be a model of diffusers, .*, got Linear"):
        load_adapter(torch.nn.Linear(2, 2), file(layer, down, up))
    assert load_adapter(case.model, file(layer, down, up) | file("lora_te1_layers_0", down, up)) == "default_0"
    assert "(2 tensors, such as 'lora_te1_layers_0.lora_A.weight'). They are left out" in caplog.text
    with pytest.raises(ValueError, match="the model has an adapter 'default_0'"):
        load_adapter(case.model, file(layer, down, up), "default_0")
    case.model.unload_lora()
    assert same_bits(bits(case.model), case.bits)


def test_a_file_that_is_not_there():
    with pytest.raises(
        FileNotFoundError, match=r"there is no file 'no/such\.safetensors'; name the file of an adapter"
    ):
        load_adapter(tiny_models.flux()[0], "no/such.safetensors")
