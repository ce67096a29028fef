"""Adapters of every kind in a pipeline, on 16 and 4 bits: beside the layers, several, scaled, swapped, fused."""

import copy
import re

import pytest
import torch
from peft import get_peft_model_state_dict

import diffusers_sana
from tests.loaders.lora.adapter_kinds import CORES, KINDS
from tests.loaders.lora.lora_files import TRANSFORMER, pipeline
from tests.models.sana_transformers import tiny_inputs, to_dtype
from tests.numerics import assert_close_fp32, relative_error
from tests.quantizers.lora_cases import bits, dense_twin, quantized, run, same_bits


NAMES = (
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.1.ff.conv_point",
    "transformer_blocks.1.attn2.to_out.0",
)
DEPTHWISE = "transformer_blocks.0.ff.conv_depth"


class Case:
    """A pipeline, the weights of its layers, and what a transformer with other weights would compute."""

    def __init__(self, is_quantized: bool, patch_size: int = 1, dtype: torch.dtype = torch.float32):
        self.pipe, self.is_quantized = pipeline(diffusers_sana, patch_size=patch_size), is_quantized
        self.model = self.pipe.transformer.to(dtype)
        self.twin = copy.deepcopy(self.model)
        if is_quantized:
            quantized(self.model)
            self.twin = dense_twin(self.model)
        self.inputs = to_dtype(tiny_inputs(self.model), dtype)
        self.before, self.bits = run(self.model, self.inputs), bits(self.model)

    def adapter(self, kind, names=NAMES, seed=0):
        """A file with an adapter of a kind, and the changed weights."""
        torch.manual_seed(seed)
        file, weights = {}, {}
        for name in names:
            tensors, weights[name] = kind.make(self.twin.get_submodule(name).weight.detach())
            file |= {f"lycoris_{name.replace('.', '_')}.{ending}": tensor for ending, tensor in tensors.items()}
        return file, weights

    def expected(self, *weights, scales=(1.0,)):
        """The output with the sum of the changes."""
        model = copy.deepcopy(self.twin)
        for changed, scale in zip(weights, scales, strict=True):
            for name, weight in changed.items():
                layer, base = model.get_submodule(name), self.twin.get_submodule(name)
                layer.weight.data = layer.weight + scale * (weight - base.weight)
        return run(model, self.inputs)

    def output(self):
        return run(self.model, self.inputs)


@pytest.fixture(scope="module")
def dense():
    return Case(is_quantized=False)


@pytest.fixture(scope="module")
def four_bits():
    return Case(is_quantized=True)


@pytest.fixture(params=["dense", "four_bits"])
def case(request):
    found = request.getfixturevalue(request.param)
    yield found
    found.pipe.unload_lora_weights()
    if request.param == "four_bits":
        assert same_bits(bits(found.model), found.bits)
    else:
        found.model.load_state_dict(found.bits)  # fusing rounds them, as PEFT does


@pytest.mark.parametrize("kind", KINDS)
def test_beside_and_fused(case, kind):
    file, weights = case.adapter(KINDS[kind])
    expected = case.expected(weights)
    case.pipe.load_lora_weights(file)
    beside = case.output()
    assert relative_error(beside, case.before) > 1e-4
    assert_close_fp32(beside, expected)
    is_exact = KINDS[kind].is_low_rank and "DoRA" not in kind
    case.pipe.fuse_lora(components=["transformer"])
    if is_exact or not case.is_quantized:
        assert_close_fp32(case.output(), expected)
    else:  # in part, see tests/quantizers/layers/test_lora.py
        assert relative_error(case.output() - case.before, expected - case.before) < 0.9
    case.pipe.unfuse_lora(components=["transformer"])
    assert_close_fp32(case.output(), beside)


@pytest.mark.parametrize("second", ["LoRA", "OFT, outputs", "DoRA, inputs"])
def test_a_dora_beside_other_kinds(case, second):
    """In one file. PEFT knows DoRA of all layers of an adapter, or of none."""
    file, weights = {}, {}
    for kind, name in zip(("DoRA, outputs", second, "DoRA, outputs"), NAMES, strict=True):
        tensors, changed = case.adapter(KINDS[kind], [name])
        file |= tensors
        weights |= changed
    case.pipe.load_lora_weights(file)
    assert_close_fp32(case.output(), case.expected(weights))


@pytest.mark.parametrize("kind", ["LoRA", "full", "OFT, outputs", "DoRA, outputs", "DoRA, inputs", "BOFT"])
def test_depthwise(dense, kind):
    """The layer's own weights, whose input axis is a single channel; LoRA has several other forms there."""
    weight = dense.twin.get_submodule(DEPTHWISE).weight.detach()
    torch.manual_seed(0)
    tensors, changed = KINDS[kind].make(weight)
    dense.pipe.load_lora_weights({f"transformer.{DEPTHWISE}.{ending}": tensor for ending, tensor in tensors.items()})
    expected = dense.expected({DEPTHWISE: changed})
    try:
        assert_close_fp32(dense.output(), expected)
        dense.pipe.fuse_lora(components=["transformer"])
        assert_close_fp32(dense.output(), expected)
        dense.pipe.unfuse_lora(components=["transformer"])
        assert_close_fp32(dense.output(), expected)
    finally:
        dense.pipe.unload_lora_weights()
        dense.model.load_state_dict(dense.bits)


@pytest.mark.parametrize("kind", CORES)
def test_cores_of_convolutions(kind):
    """Of the patch embedding, the only layer of Sana whose kernel mixes channels and positions."""
    case = Case(is_quantized=False, patch_size=2)
    name = "patch_embed.proj"
    file, weights = case.adapter(CORES[kind], [name])
    expected = case.expected(weights)
    case.pipe.load_lora_weights(file)
    assert_close_fp32(case.output(), expected)
    case.pipe.fuse_lora(components=["transformer"])
    assert_close_fp32(case.output(), expected)


def test_several_scaled_swapped_and_deleted(case):
    kinds = {"turn": "OFT, outputs", "kron": "LoKr", "plain": "LoRA"}
    files, weights = [], []
    for index, (name, kind) in enumerate(kinds.items()):
        file, changed = case.adapter(KINDS[kind], seed=index)
        case.pipe.load_lora_weights(file, adapter_name=name)
        files.append(file)
        weights.append(changed)
    case.pipe.set_adapters(["turn", "kron", "plain"], [0.5, -0.7, 0.9])
    together = case.output()
    assert_close_fp32(together, case.expected(*weights, scales=(0.5, -0.7, 0.9)))
    case.pipe.disable_lora()
    assert torch.equal(case.output(), case.before)
    case.pipe.enable_lora()
    other, changed = case.adapter(KINDS["OFT, outputs"], seed=7)
    kept = {key: tensor.clone() for key, tensor in other.items()}
    case.pipe.load_lora_weights(other, adapter_name="turn", hotswap=True)
    case.pipe.set_adapters("turn")
    assert_close_fp32(case.output(), case.expected(changed))
    case.pipe.load_lora_weights(files[0], adapter_name="turn", hotswap=True)
    assert all(torch.equal(other[key], tensor) for key, tensor in kept.items())
    case.pipe.set_adapters(["kron", "plain"], [1.0, 1.0])
    case.pipe.delete_adapters("turn")
    assert_close_fp32(case.output(), case.expected(*weights[1:], scales=(1.0, 1.0)))


def test_several_fused(dense):
    """Changes are those of the layer's own weight, whichever is fused first."""
    kinds = ("LoRA", "OFT, inputs, scaled and shared", "DoRA, inputs")
    names = (NAMES[0], NAMES[2])
    weights = []
    for index, kind in enumerate(kinds):
        file, changed = dense.adapter(KINDS[kind], names, index)
        dense.pipe.load_lora_weights(file, adapter_name=f"adapter{index}")
        weights.append(changed)
    dense.pipe.set_adapters(["adapter0", "adapter1", "adapter2"], [1.0, 0.5, 0.25])
    expected = dense.expected(*weights, scales=(1.0, 0.5, 0.25))
    assert_close_fp32(dense.output(), expected)
    dense.pipe.fuse_lora(components=["transformer"], safe_fusing=True)
    assert_close_fp32(dense.output(), expected)
    dense.pipe.unfuse_lora(components=["transformer"])
    assert_close_fp32(dense.output(), expected)
    dense.pipe.unload_lora_weights()
    dense.model.load_state_dict(dense.bits)


@pytest.mark.parametrize("kind", ["LoKr with DoRA, inputs", "OFT, outputs, rescaled and bounded", "BOFT"])
def test_saved_again(case, kind, tmp_path):
    file, _ = case.adapter(KINDS[kind])
    case.pipe.load_lora_weights(file, adapter_name="first")
    case.pipe.set_adapters("first", 0.5)
    expected = case.output()
    layers = get_peft_model_state_dict(case.model, adapter_name="first")
    metadata = case.model.peft_config["first"].to_dict()
    case.pipe.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    case.pipe.unload_lora_weights()
    case.pipe.load_lora_weights(tmp_path, adapter_name="again")
    case.pipe.set_adapters("again", 0.5)
    assert_close_fp32(case.output(), expected)


def test_half_precision_errs_no_more_than_its_rounding():
    """On 4 bits the parts stay in the precision of their file, and the rest is bf16."""
    case = Case(is_quantized=True, dtype=torch.bfloat16)
    exact = copy.deepcopy(case.twin).float()
    inputs = to_dtype(case.inputs, torch.float32)
    plain = relative_error(case.before, run(exact, inputs))
    for name in NAMES:
        layer = exact.get_submodule(name)
        tensors, layer.weight.data = KINDS["OFT, outputs"].make(layer.weight.detach())
        file = {f"transformer.{name}.{ending}": x for ending, x in tensors.items()}
        case.pipe.load_lora_weights(file, adapter_name=name.replace(".", "_"))
    case.pipe.set_adapters(case.pipe.get_list_adapters()["transformer"])
    output, expected = case.output(), run(exact, inputs)
    assert output.dtype == torch.bfloat16
    assert relative_error(expected, run(case.twin.float(), inputs)) > 5 * plain
    assert relative_error(output, expected) < 1.5 * plain


def test_a_bias(case):
    """Of LyCORIS' `full`; layers without a bias have it beside them alone."""
    name, bare = NAMES[2], NAMES[0]
    torch.manual_seed(0)
    tensors, changed = KINDS["full"].make(case.twin.get_submodule(name).weight.detach())
    bias = torch.randn(len(changed)) * 0.1
    model = copy.deepcopy(case.twin)
    model.get_submodule(name).weight.data, model.get_submodule(name).bias.data = (
        changed,
        model.get_submodule(name).bias + bias,
    )
    expected = run(model, case.inputs)
    case.pipe.load_lora_weights({f"transformer.{name}.diff": tensors["diff"], f"transformer.{name}.diff_b": bias})
    assert_close_fp32(case.output(), expected)
    before = case.model.get_submodule(name).get_base_layer().bias.clone()
    case.pipe.fuse_lora(components=["transformer"])
    assert_close_fp32(case.model.get_submodule(name).get_base_layer().bias, before + bias)
    case.pipe.unfuse_lora(components=["transformer"])
    case.model.get_submodule(name).get_base_layer().bias.data.copy_(before)  # rounded
    case.pipe.unload_lora_weights()
    assert case.model.get_submodule(bare).bias is None
    case.pipe.load_lora_weights({f"transformer.{bare}.diff_b": bias}, adapter_name="beside")
    assert relative_error(case.output(), case.before) > 1e-3
    with pytest.raises(
        ValueError, match="adapter 'beside' adds a bias, so it cannot be fused with a layer that has none"
    ):
        case.pipe.fuse_lora(components=["transformer"])


@pytest.mark.parametrize(
    ("endings", "message"),
    [
        (
            {"diff": (64, 48)},
            "must be of a layer with 64 outputs and 64 inputs for this model, got [64] outputs and [48]",
        ),
        ({"oft_blocks": (5, 8, 8)}, "64 outputs and 64 inputs for this model, got [40] outputs and [] inputs"),
        ({"oft_R.weight": (6, 28)}, "got [] outputs and [48] inputs. It was trained for another model."),
    ],
)
def test_of_another_size(case, endings, message):
    file = {f"transformer.{NAMES[0]}.{ending}": torch.ones(shape) * 0.01 for ending, shape in endings.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        case.pipe.load_lora_weights(file)
    assert not hasattr(case.model.get_submodule(NAMES[0]), "lora_variant")
    assert torch.equal(case.output(), case.before)


def test_an_adapter_that_is_fused_in_all_layers_or_none(four_bits):
    """One layer's change is larger than its weight, and of full rank."""
    file, _ = four_bits.adapter(KINDS["LoRA"], NAMES[:1])
    weight = four_bits.twin.get_submodule(NAMES[1]).weight
    file[f"transformer.{NAMES[1]}.diff"] = torch.randn(weight.shape) * weight.std() * 3
    four_bits.pipe.load_lora_weights(file)
    expected = four_bits.output()
    with pytest.raises(RuntimeError, match=r"cannot store a change of high rank that is \d(\.\d)? times as large"):
        four_bits.pipe.fuse_lora(components=["transformer"])
    assert torch.equal(four_bits.output(), expected)
    four_bits.pipe.delete_adapters("default_0")
    file[f"transformer.{NAMES[1]}.diff"] *= 0.1  # of the size of an adapter, but without strong directions
    four_bits.pipe.load_lora_weights(file, adapter_name="noise")
    expected = four_bits.output()
    with pytest.raises(RuntimeError, match=r"directions that it has room for, 7\d% of the change of the output"):
        four_bits.pipe.fuse_lora(components=["transformer"])
    assert torch.equal(four_bits.output(), expected)
    four_bits.pipe.unload_lora_weights()
    assert same_bits(bits(four_bits.model), four_bits.bits)


def test_a_swap_that_fails_leaves_no_trace(case):
    """PEFT swaps adapters of the same layers and parts only."""
    file, weights = case.adapter(KINDS["LoRA"])
    case.pipe.load_lora_weights(file, adapter_name="plain")
    other, _ = case.adapter(KINDS["OFT, outputs"])
    with pytest.raises(ValueError, match=r"adapter 'plain' cannot be swapped for one of another kind: .*'out_blocks'"):
        case.pipe.load_lora_weights(other, adapter_name="plain", hotswap=True)
    assert_close_fp32(case.output(), case.expected(weights))


assert TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"] == 64  # what the blocks above divide


@pytest.mark.parametrize("kind", ["LoRA", "full"])
def test_swapping_leaves_the_given_tensors_alone(case, kind):
    """PEFT may keep the tensors of the first dictionary as the parameters that a swap overwrites."""
    files = [case.adapter(KINDS[kind], seed=seed)[0] for seed in (1, 2)]
    kept = [{key: tensor.clone() for key, tensor in file.items()} for file in files]
    case.pipe.load_lora_weights(files[0], adapter_name="swapped")
    case.pipe.load_lora_weights(files[1], adapter_name="swapped", hotswap=True)
    for file, before in zip(files, kept, strict=True):
        assert all(torch.equal(file[key], tensor) for key, tensor in before.items())


def test_a_dora_is_not_swapped(case):
    """PEFT would raise a KeyError for its magnitudes; the adapter stays."""
    files = [case.adapter(KINDS["DoRA, outputs"], seed=seed)[0] for seed in (1, 2)]
    case.pipe.load_lora_weights(files[0], adapter_name="swapped")
    before = case.output()
    with pytest.raises(ValueError, match="'swapped' cannot be swapped for a DoRA"):
        case.pipe.load_lora_weights(files[1], adapter_name="swapped", hotswap=True)
    assert torch.equal(case.output(), before)
