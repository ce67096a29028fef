"""Adapters on a quantized Sana through diffusers' and PEFT's own calls: as on the dense model of the same weights."""

import copy
import io
import re
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from peft import BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

import diffusers_sana
from diffusers_sana.quantizers.svdquant.algorithm.decompose import decompose
from diffusers_sana.quantizers.svdquant.api import set_compute_mode
from diffusers_sana.quantizers.svdquant.config import LayerConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer, SVDQuantLinear
from tests import tiny
from tests.models.sana_transformers import tiny_inputs, tiny_model, to_dtype
from tests.numerics import assert_close_fp32, assert_no_worse, relative_error
from tests.quantizers.lora_cases import bits, dense_twin, lora_file, prefixed, quantized, run, same_bits


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return quantized(tiny_model(num_layers=1))


@pytest.fixture
def models(original):
    """The quantized model and its dense twin."""
    return copy.deepcopy(original), dense_twin(original)


@pytest.fixture
def files(original):
    """Two files; the second has another rank and only some of the layers."""
    return lora_file(original, seed=1), lora_file(original, seed=2, rank=2, pick="attn1")


def load(model, file, name, **kwargs):
    model.load_lora_adapter(dict(file), prefix=None, adapter_name=name, **kwargs)


def calls_of_adapted_layers(model, inputs):
    """Of a run: layers with adapters, their inputs and outputs.

    For equal inputs, layers quantize to equal codes. In a whole model the inputs of later layers differ by rounding,
    and may get the next code: how far the output is off then depends on the processor.
    """
    calls, layers = [], [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    hooks = [
        layer.register_forward_hook(lambda layer, given, output: calls.append((layer, given[0], output)))
        for layer in layers
    ]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    assert {id(layer) for layer, _, _ in calls} == {id(layer) for layer in layers}
    return calls


def assert_alike(models):
    """Equal outputs; returns the quantized model's."""
    inputs = tiny_inputs(models[0])
    output, expected = (run(model, inputs) for model in models)
    assert_close_fp32(output, expected)
    return output


def test_adapters_come_and_go(models, files):
    before, base = bits(models[0]), assert_alike(models)
    outputs = [base]

    def then(action):
        for model in models:
            action(model)
        outputs.append(assert_alike(models))

    then(lambda model: load(model, files[0], "first"))
    then(lambda model: load(model, files[1], "second"))
    then(lambda model: model.set_adapters(["first", "second"], [0.3, -0.7]))
    then(lambda model: model.set_adapters(["second"], [2.0]))
    then(lambda model: load(model, lora_file(models[0], seed=3, rank=2, pick="attn1"), "second", hotswap=True))
    assert min(relative_error(one, other) for one, other in pairwise(outputs)) > 1e-3
    then(lambda model: model.disable_lora())
    assert torch.equal(outputs[-1], base)
    then(lambda model: model.enable_lora())
    assert torch.equal(outputs[-1], outputs[-3])
    then(lambda model: model.delete_adapters("second"))
    then(lambda model: model.unload_lora())
    assert torch.equal(outputs[-1], base)
    assert same_bits(bits(models[0]), before)


@pytest.mark.parametrize("mode", ["w4a16", "w4a8", "w4a4"])
def test_fused_is_the_same_and_goes_back(models, files, mode):
    model, inputs = models[0], tiny_inputs(models[0])
    set_compute_mode(model, mode)
    base = run(model, inputs)
    load(model, files[0], "first")
    load(model, files[1], "second")
    model.set_adapters(["first", "second"], [0.3, -0.7])
    before, beside = bits(model), run(model, inputs)
    calls = calls_of_adapted_layers(model, inputs)
    model.fuse_lora()
    assert model.transformer_blocks[0].attn1.to_q.base_layer.rank == 4 + 3 + 2
    assert model.transformer_blocks[0].ff.conv_point.base_layer.rank == 4 + 3
    for layer, given, expected in calls:
        assert_close_fp32(layer(given), expected)
    if mode == "w4a16":
        assert_close_fp32(run(model, inputs), beside)
    model.unfuse_lora()
    assert torch.equal(run(model, inputs), beside)
    assert same_bits(bits(model), before)
    model.unload_lora()
    assert torch.equal(run(model, inputs), base)


def test_fused_in_part_and_scaled(models, files):
    for model in models:
        load(model, files[0], "first")
        load(model, files[1], "second")
        model.fuse_lora(lora_scale=0.4, adapter_names=["second"])
        model.set_adapters(["first", "second"], [5.0, 5.0])  # without effect on what is fused
    fused = assert_alike(models)
    attention = models[0].transformer_blocks[0].attn1
    assert (attention.to_q.base_layer.rank, attention.to_out[0].base_layer.rank) == (6, 6)
    assert models[0].transformer_blocks[0].ff.conv_point.base_layer.rank == 4
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        models[0].fuse_lora(adapter_names=["second"])
    assert torch.equal(run(models[0], tiny_inputs(models[0])), fused)
    for model in models:
        model.unload_lora()  # what is fused stays
    assert attention.to_q.rank == 6
    assert_alike(models)


def test_fused_for_good_then_another(models, files):
    model, inputs = models[0], tiny_inputs(models[0])
    load(model, files[0], "first")
    model.fuse_lora()
    model.unload_lora()
    kept = run(model, inputs)
    load(model, files[1], "second")
    model.fuse_lora()
    assert relative_error(run(model, inputs), kept) > 1e-3
    model.disable_lora()  # PEFT then separates what is fused, at the next run
    assert torch.equal(run(model, inputs), kept)


def test_saved_after_fusing(models, files, tmp_path):
    load(models[0], files[0], "first")
    models[0].fuse_lora()
    models[0].unload_lora()
    models[0].save_pretrained(tmp_path)
    loaded = diffusers_sana.SanaTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.transformer_blocks[0].attn1.to_q.rank == 4 + 3
    assert same_bits(bits(loaded), bits(models[0]))
    inputs = tiny_inputs(loaded)
    assert torch.equal(run(loaded, inputs), run(models[0], inputs))


def test_copies_fuse_as_well(models, files):
    model, inputs = models[0], tiny_inputs(models[0])
    load(model, files[0], "first")
    twin = copy.deepcopy(model)
    model.fuse_lora()
    twin.fuse_lora(lora_scale=0.0)
    assert relative_error(run(twin, inputs), run(model, inputs)) > 1e-3
    twin.unfuse_lora()
    model.unload_lora()
    twin.unload_lora()
    assert twin.transformer_blocks[0].attn1.to_q.rank == 4
    assert model.transformer_blocks[0].attn1.to_q.rank == 7


def test_peft_alone(original):
    """Without diffusers, and with PEFT's way to fuse."""
    layers = nn.Sequential(copy.deepcopy(original.transformer_blocks[0].attn1.to_q))
    hidden_states = torch.randn(3, layers[0].in_features)
    model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    beside = model(hidden_states)
    merged = model.merge_and_unload()
    assert isinstance(merged[0], SVDQuantLayer)
    assert merged[0].rank == 4 + 2
    assert_close_fp32(merged(hidden_states), beside)


LOW_RANK_KINDS = {
    "bias": (LoraConfig, {"r": 2, "lora_bias": True, "init_lora_weights": False}),
    "loha": (LoHaConfig, {"r": 2, "init_weights": False}),
}
HIGH_RANK_KINDS = {
    "dora": (LoraConfig, {"r": 2, "use_dora": True}),
    "lokr": (LoKrConfig, {"r": 8, "init_weights": False}),
    "oft": (OFTConfig, {"r": 0, "oft_block_size": 8, "init_weights": False}),
    "boft": (BOFTConfig, {"boft_block_size": 8, "init_weights": False}),
}


def add_adapter(models, config_class, options):
    """Small enough to be an adapter: it changes a weight by less than half of it."""
    for model in models:
        torch.manual_seed(1)
        model.add_adapter(config_class(target_modules=["attn2.to_q", "attn2.to_out.0"], **options), "odd")
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # DoRA begins as a LoRA
                parameter.data *= torch.linspace(0.8, 1.2, len(parameter))
            elif ".odd" in name and not parameter.any():
                parameter.data = torch.randn(parameter.shape) * 0.01
            elif ".odd" in name and "boft_s" not in name and "lora_" not in name:
                parameter.data *= 0.3


@pytest.mark.parametrize("kind", LOW_RANK_KINDS)
def test_other_kinds_of_low_rank_are_fused(models, kind):
    add_adapter(models, *LOW_RANK_KINDS[kind])
    model, before, beside = models[0], bits(models[0]), assert_alike(models)
    model.fuse_lora()
    assert_close_fp32(run(model, tiny_inputs(model)), beside)
    model.unfuse_lora()
    assert_close_fp32(run(model, tiny_inputs(model)), beside)
    weights = {name: tensor for name, tensor in before.items() if not name.endswith("bias")}  # PEFT rounds those
    assert same_bits({name: bits(model)[name] for name in weights}, weights)


@pytest.mark.filterwarnings("ignore:.*(CUDA extension|butterfly_factor)")
@pytest.mark.parametrize("kind", HIGH_RANK_KINDS)
def test_kinds_of_high_rank_are_exact_beside_the_layer_and_fused_in_part(models, kind, caplog):
    """The warning states the error of the weight's change, and what was fused goes away bit for bit."""
    without = run(models[0], tiny_inputs(models[0]))
    add_adapter(models, *HIGH_RANK_KINDS[kind])
    before, beside = bits(models[0]), assert_alike(models)
    layer = models[0].transformer_blocks[0].attn2.to_q.base_layer
    weight = layer.weight.clone()
    models[0].fuse_lora()
    ranks = layer.out_features // 4
    assert layer.rank == 4 + ranks
    models[1].fuse_lora()
    wanted = models[1].transformer_blocks[0].attn2.to_q.base_layer.weight - weight
    values = torch.linalg.svdvals(wanted).square()
    best = (values[ranks:].sum() / values.sum()).sqrt().item()
    error = relative_error(layer.weight - weight, wanted)
    assert best * 0.99 < error < best * 1.05  # as good as a part of that rank can be
    assert f"the {ranks} strongest ones are kept, which leaves out {error:.1%} of the change of the" in caplog.text
    assert f"and {error:.1%} of that of the weight" in caplog.text  # the same without smoothing
    fused = run(models[0], tiny_inputs(models[0]))
    assert 0.02 < relative_error(fused - without, beside - without) < 0.8
    models[0].unfuse_lora()
    assert same_bits(bits(models[0]), before)
    assert torch.equal(run(models[0], tiny_inputs(models[0])), beside)


def test_a_part_is_the_best_for_inputs_that_the_layer_was_smoothed_for(caplog):
    """Channels of very different sizes: keeping the strongest directions of the weight alone is much worse."""
    torch.manual_seed(0)
    sizes = torch.exp(1.5 * torch.randn(64))
    weight, inputs, held_out = torch.randn(48, 64), torch.randn(256, 64) * sizes, torch.randn(256, 64) * sizes
    (item,), _ = decompose([weight], LayerConfig("int4", 4), inputs)
    layer = SVDQuantLinear(item, compute_mode="w4a16")
    before, ranks = bits(layer), 12
    change = 0.3 * torch.randn(48, 64)
    layer.add_to_weight(change)
    kept = layer.proj_up[:, -ranks:] @ layer.proj_down[-ranks:]
    error = relative_error(held_out @ kept.t(), held_out @ change.t())
    up, values, down = torch.linalg.svd(change)
    strongest = up[:, :ranks] * values[:ranks] @ down[:ranks]
    assert error < 0.6 * relative_error(held_out @ strongest.t(), held_out @ change.t())
    up, values, down = torch.linalg.svd(change * sizes)
    best = up[:, :ranks] * values[:ranks] @ down[:ranks] / sizes
    assert error < 1.15 * relative_error(held_out @ best.t(), held_out @ change.t())
    stated = float(re.search(r"([\d.]+)% of the change of the output", caplog.text)[1]) / 100
    assert 0.5 * error < stated < 2 * error
    assert f"and {relative_error(kept, change):.1%} of that of the weight" in caplog.text
    layer.add_to_weight(-change)
    assert same_bits(bits(layer), before)


@pytest.mark.parametrize("smoothed", [False, True])
def test_a_part_is_no_other_change(original, smoothed):
    """Only what undoes a change takes its part away."""
    layer = copy.deepcopy(original.transformer_blocks[0].attn2.to_q)
    if smoothed:
        layer.smooth_factor.data = torch.exp(torch.randn(layer.in_features))
    torch.manual_seed(1)
    strength = layer.weight.std() / torch.arange(1, layer.in_features + 1)  # some directions are strong
    first, second = (torch.randn(layer.weight.shape) * strength for _ in range(2))
    layer.add_to_weight(first)
    one = bits(layer)
    layer.add_to_weight(second)
    layer.add_to_weight(-0.5 * first)
    assert layer.rank == 4 + 3 * (layer.out_features // 4)
    layer.add_to_weight(0.5 * first)
    layer.add_to_weight(-second)
    assert same_bits(bits(layer), one)


def test_dora_on_a_convolution(models):
    for model in models:
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=["conv_point"]))
    assert_alike(models)


def test_safe_fusing(models, files):
    file = {name: tensor.fill_(torch.nan) if "to_q" in name else tensor for name, tensor in files[0].items()}
    load(models[0], file, "broken")
    for safe, message in ((True, "adapter broken seems to be broken"), (False, "must be finite, got NaN")):
        with pytest.raises(ValueError, match=message):
            models[0].fuse_lora(safe_fusing=safe)
    assert models[0].transformer_blocks[0].attn1.to_q.base_layer.rank == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safely_fused_is_the_same_and_goes_back(models, files, dtype):
    """PEFT then assigns the whole sum, rounded to the weight's dtype."""
    model = models[0] if dtype == torch.float32 else quantized(tiny_model(num_layers=1).to(dtype))
    inputs = to_dtype(tiny_inputs(model), dtype)
    load(model, {name: tensor.to(dtype) for name, tensor in files[0].items()}, "first")
    before, beside = bits(model), run(model, inputs)
    model.fuse_lora(safe_fusing=True)
    if dtype == torch.float32:
        assert_close_fp32(run(model, inputs), beside)
        assert model.transformer_blocks[0].attn1.to_q.base_layer.rank == 4 + 3
    else:
        assert relative_error(run(model, inputs), beside) < 0.02
    model.unfuse_lora()
    assert torch.equal(run(model, inputs), beside)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision(files, adapter_dtype):
    half = quantized(tiny_model(num_layers=1).to(torch.bfloat16))
    eager = dense_twin(half)
    reference = copy.deepcopy(eager).float()
    file = {name: tensor.to(adapter_dtype) for name, tensor in files[0].items()}
    for model in (half, eager, reference):
        load(model, file, "first")
    inputs = to_dtype(tiny_inputs(half), torch.bfloat16)
    output, expected = run(half, inputs), run(reference, to_dtype(inputs, torch.float32))
    assert output.dtype == torch.bfloat16
    assert_no_worse(output, run(eager, inputs), expected)
    half.fuse_lora()
    assert_no_worse(run(half, inputs), run(eager, inputs), expected, factor=1.5)


WRITES = {
    "data": lambda weight: setattr(weight, "data", torch.zeros_like(weight)),
    "data of another shape": lambda weight: setattr(weight, "data", torch.zeros(3)),
    "data += 1": lambda weight: setattr(weight, "data", weight.data.__iadd__(1)),
    "data +=": lambda weight: setattr(weight, "data", weight.data.__iadd__(torch.randn(weight.shape))),
    "data.copy_": lambda weight: weight.data.copy_(torch.zeros_like(weight)),
    "item": lambda weight: weight.__setitem__(0, 1.0),
    "init": nn.init.zeros_,
    "out": lambda weight: torch.add(weight, 1, out=weight),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", ["attn1.to_q", "ff.conv_point"])
def test_weight_refuses_writes_that_it_cannot_keep(models, write, name):
    weight = models[0].transformer_blocks[0].get_submodule(name).weight
    before = bits(models[0])
    with pytest.raises(RuntimeError, match=r"quantized layer cannot (be written to|store a change)"):
        WRITES[write](weight)
    assert same_bits(bits(models[0]), before)


@pytest.mark.parametrize("name", ["attn1.to_q", "ff.conv_point"])
def test_what_is_made_of_a_weight_is_plain(models, name):
    weight = models[0].transformer_blocks[0].get_submodule(name).weight
    file = io.BytesIO()
    torch.save(weight, file)
    for made in (weight * 1, weight.clone(), copy.deepcopy(weight), torch.load(io.BytesIO(file.getvalue()))):
        assert type(made) is torch.Tensor
        assert torch.equal(made, weight)


def test_loading_computes_no_weight(models, files, monkeypatch):
    """PEFT asks each layer several times for shape, dtype and device of its weight; at true size that takes long."""
    monkeypatch.setattr(SVDQuantLayer, "dequantize", lambda *args: pytest.fail("computed a weight"))
    load(models[0], files[0], "first", low_cpu_mem_usage=True)
    models[0].fuse_lora()
    models[0].unfuse_lora()
    models[0].unload_lora()


def test_state_dict_answers_for_weights(models, files):
    load(models[0], files[1], "first")
    state_dict, block = models[0].state_dict(), models[0].transformer_blocks[0]
    wrapped, plain = "transformer_blocks.0.attn1.to_q.base_layer.weight", "transformer_blocks.0.attn2.to_q.weight"
    assert wrapped in state_dict
    assert torch.equal(state_dict[wrapped], block.attn1.to_q.base_layer.weight)
    assert torch.equal(state_dict[plain], block.attn2.to_q.weight)
    assert not {wrapped, plain} & set(state_dict.keys())
    for key in ("transformer_blocks.0.norm1.weight", "transformer_blocks.0.attn2.to_q.", "weight"):
        assert key not in state_dict
        with pytest.raises(KeyError):
            state_dict[key]


def test_state_dict_can_be_saved_and_loaded_by_torch(models, files):
    model, expected = models[0], bits(models[0])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    loaded = torch.load(io.BytesIO(file.getvalue()))
    assert type(loaded) is type(copy.deepcopy(model.state_dict())) is OrderedDict
    assert loaded._metadata == model.state_dict()._metadata
    assert same_bits(loaded, expected)
    for parameter in model.parameters():
        parameter.data.view(torch.uint8).zero_()
    model.load_state_dict(loaded)
    assert same_bits(bits(model), expected)


@pytest.mark.parametrize("name", ["attn1.to_q", "ff.conv_point"])
@torch.no_grad()
def test_compiles_as_one_graph(models, files, name):
    load(models[0], files[0], "first")
    layer = models[0].transformer_blocks[0].get_submodule(name)
    hidden_states = torch.randn(2, layer.in_features, *((3, 3) if "conv" in name else ()))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close_fp32(compiled(hidden_states), layer(hidden_states))
    read = torch.compile(lambda: layer.base_layer.weight + 1, fullgraph=True, backend="eager")
    assert torch.equal(read(), layer.base_layer.dequantize().view(layer.base_layer.weight.shape) + 1)


def as_lora_of_old_diffusers(file):
    renamed = {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): file[name] for name in file}
    return prefixed(renamed)


@pytest.mark.parametrize("rename", [prefixed, as_lora_of_old_diffusers])
def test_pipeline(rename, tmp_path):
    def generate():
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=2, height=32, width=32, generator=generator, output_type="pt").images

    pipe = tiny.pipeline(diffusers_sana)
    model = quantized(pipe.transformer)
    base = generate()
    for index, name in enumerate(["first", "second"]):
        save_file(rename(lora_file(model, seed=index)), tmp_path / f"{name}.safetensors")
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["first", "second"], [0.5, 0.8])
    beside = generate()
    pipe.transformer = dense_twin(model)
    assert_close_fp32(beside, generate(), tolerance=1e-4)  # a few steps of the sampler and the decoder
    pipe.transformer = model
    pipe.fuse_lora(components=["transformer"])
    assert pipe.fused_loras == {"first", "second"}
    assert_close_fp32(generate(), beside, tolerance=1e-4)
    pipe.unfuse_lora(components=["transformer"])
    assert pipe.num_fused_loras == 0
    assert torch.equal(generate(), beside)
    pipe.unload_lora_weights()
    assert torch.equal(generate(), base)
    assert relative_error(beside, base) > 1e-3
