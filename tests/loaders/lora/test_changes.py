"""Adapters of every kind: the weight of their writers' rules, and the output of the layer that has that weight."""

import copy

import pytest
import torch
from peft import BOFTConfig, LoHaConfig, LoKrConfig, OFTConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from diffusers_sana.loaders.lora.changes import CHANGE, output_change, split_outputs, weight_change, with_gains
from diffusers_sana.loaders.lora.formats import convert_sana_lora, lora_scale
from diffusers_sana.loaders.lora.rotations import BOFT, rotation_parts
from tests.loaders.lora.adapter_kinds import KINDS, turns
from tests.numerics import assert_close_fp32


NAME = "transformer_blocks.0.attn1.to_q"


def parts_of(tensors, name=NAME, metadata=None):
    """What a file gives for one layer, as the parts of a change, with its scale; a LoRA counts as one."""
    converted, fields = convert_sana_lora({f"{name}.{ending}": x for ending, x in tensors.items()}, metadata)
    parts = {key.partition(f"transformer.{name}.")[2].removeprefix(CHANGE): x for key, x in converted.items()}
    rank = len(parts["lora_A.weight"]) if "lora_A.weight" in parts else 1
    renamed = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "out_magnitude"}
    return {renamed.get(part, part): x for part, x in parts.items()}, lora_scale(fields, name, rank)


@pytest.mark.parametrize("name", KINDS)
def test_weight_and_output(name):
    torch.manual_seed(0)
    weight = torch.randn(32, 16) * 0.2
    tensors, expected = KINDS[name].make(weight)
    parts, scale = parts_of(tensors)
    assert ("down" in parts and not parts.keys() & {"in_magnitude"}) == KINDS[name].is_low_rank
    if "down" in parts:
        parts["up"] = parts["up"] * scale
        scale = 1.0
    parts = with_gains(parts, weight)
    change = scale * weight_change(parts, weight)
    assert change.norm() > 0.01 * weight.norm()
    assert_close_fp32(weight + change, expected)
    x = torch.randn(2, 5, 16)
    output = scale * output_change(parts, x, lambda x: x @ weight.t())
    assert_close_fp32(output, x @ (expected - weight).t())


@pytest.mark.parametrize("name", ["LoKr", "LoHa, high rank", "full", "OFT, outputs", "LoKr with DoRA, outputs"])
def test_a_fused_layer_is_split(name):
    torch.manual_seed(0)
    weight = torch.randn(48, 16) * 0.2
    tensors, expected = KINDS[name].make(weight)
    parts, scale = parts_of(tensors)
    rows = weight.chunk(3)
    for piece, row, wanted in zip(split_outputs(parts, (1, 1, 1)), rows, expected.chunk(3), strict=True):
        assert_close_fp32(row + scale * weight_change(with_gains(piece, row), row), wanted)
    through_the_file, _ = convert_sana_lora({f"blocks.0.attn.qkv.{ending}": x for ending, x in tensors.items()})
    assert {key.split(".lora_")[0][-4:] for key in through_the_file} == {"to_q", "to_k", "to_v"}


PEFT = {
    "OFT": OFTConfig(r=0, oft_block_size=8, init_weights=False),
    "OFT, exact": OFTConfig(r=0, oft_block_size=8, init_weights=False, use_cayley_neumann=False),
    "OFT, shared, 3 terms": OFTConfig(
        r=0, oft_block_size=8, init_weights=False, block_share=True, num_cayley_neumann_terms=3
    ),
    "BOFT": BOFTConfig(boft_block_size=8, init_weights=False),
    "LoHa": LoHaConfig(r=4, alpha=8, init_weights=False),
    "LoKr": LoKrConfig(r=4, alpha=8, init_weights=False),
    "LoKr, both": LoKrConfig(r=1, alpha=2, decompose_both=True, init_weights=False),
}


@pytest.mark.filterwarnings("ignore:.*(CUDA extension|butterfly_factor)")
@pytest.mark.parametrize("name", PEFT)
def test_files_of_peft(name):
    """Written by PEFT, with its config; compared with what PEFT's own layer computes."""
    torch.manual_seed(0)
    config = copy.deepcopy(PEFT[name])
    config.target_modules = ["to_q"]
    model = nn.ModuleDict({"to_q": nn.Linear(32, 64)})
    model.forward = lambda x: model["to_q"](x)
    weight = model["to_q"].weight.detach().clone()
    x = torch.randn(3, 32)
    before = model["to_q"](x).detach()
    peft = get_peft_model(model, config)
    for parameter in peft.parameters():
        if parameter.requires_grad and "OFT" in name:
            parameter.data *= 0.3
    tensors = {
        key.replace("to_q", NAME): x.detach() for key, x in get_peft_model_state_dict(peft).items() if "to_q" in key
    }
    converted, fields = convert_sana_lora(tensors, config.to_dict())
    parts = {key.partition(f"transformer.{NAME}.")[2].removeprefix(CHANGE): x for key, x in converted.items()}
    if "lora_A.weight" in parts:
        parts = {"down": parts["lora_A.weight"], "up": parts["lora_B.weight"]}
    scale = lora_scale(fields, NAME, len(parts["down"]) if "down" in parts else 1)
    with torch.no_grad():
        expected = peft(x)
    change = scale * output_change(parts, x, lambda x: x @ weight.t())
    assert change.norm() > 0.02 * before.norm()
    assert_close_fp32(before + change, expected)


def test_butterflies_of_peft():
    """PEFT computes several factors only where it compiles for CUDA; here they are from the formula of its layer."""
    torch.manual_seed(0)
    inputs, side, factors = 32, 4, 3
    values = torch.randn(factors, inputs // side, side, side) * 0.1
    rotation = torch.eye(inputs)
    for index, block in enumerate(turns(-0.5 * (values - values.transpose(2, 3)))):
        group, half = side * 2**index, side // 2
        chunks = torch.arange(inputs).reshape(-1, group // half, half)
        order = torch.cat([chunks[:, ::2], chunks[:, 1::2]], dim=1).flatten()
        permutation = torch.eye(inputs)[order]
        rotation = permutation @ torch.block_diag(*block) @ permutation.t() @ rotation
    weight = torch.randn(24, inputs)
    parts = rotation_parts({BOFT: values}, None, {}, is_conv=False)
    assert_close_fp32(weight + weight_change(parts, weight), (rotation @ weight.t()).t())
    x = torch.randn(5, inputs)
    turned = x @ weight.t() + output_change(parts, x, lambda x: x @ weight.t())
    assert_close_fp32(turned, x @ rotation @ weight.t())


def test_a_small_rotation_keeps_its_digits():
    """Blocks hold the difference from the identity, and nothing large is subtracted."""
    torch.manual_seed(0)
    weight, x = torch.randn(32, 16), torch.randn(4, 16)
    for name in ("OFT, inputs", "OFT, outputs", "BOFT"):
        tensors, _ = KINDS[name].make(weight)
        tensors = {ending: tensor * 1e-4 for ending, tensor in tensors.items()}
        parts, _ = parts_of(tensors)
        exact = {part: tensor.double() for part, tensor in parts.items()}
        expected = output_change(exact, x.double(), lambda x: x @ weight.double().t())
        assert_close_fp32(output_change(parts, x, lambda x: x @ weight.t()), expected.float())


def test_dora_of_a_weight_without_direction():
    parts = {"diff": torch.zeros(4, 4), "out_magnitude": torch.ones(4)}
    with pytest.raises(ValueError, match="'out_magnitude' of DoRA needs a direction"):
        with_gains(parts, torch.zeros(4, 4))
