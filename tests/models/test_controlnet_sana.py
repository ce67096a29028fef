"""Sana's ControlNet against the diffusers class: configuration, keys, outputs, both wirings, training, saving."""

import inspect
import json
from functools import partial

import diffusers
import peft
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_sana import SanaControlNetModel, SVDQuantConfig, quantize
from diffusers_sana.models.controlnets.controlnet_sana import control
from tests.models.controlnets import STRENGTH, diffusers_twin, tiny_control, tiny_controlnet
from tests.models.sana_transformers import tiny_config, tiny_inputs, tiny_model, upstream_twin
from tests.numerics import assert_close_fp32, relative_error


BASE_600M = {"num_attention_heads": 36, "num_cross_attention_heads": 16}
BASE_600M |= {"cross_attention_head_dim": 72, "cross_attention_dim": 1152}


def outputs(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).controlnet_block_samples


def assert_equal_outputs(actual, expected):
    assert len(actual) == len(expected) > 0
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close_fp32(ours, theirs)


@pytest.mark.parametrize(
    ("config", "num_parameters"), [(BASE_600M, 168_765_696), ({}, 631_576_960)], ids=["600M", "1600M"]
)
def test_released_configurations(config, num_parameters):
    with torch.device("meta"):
        model, upstream = SanaControlNetModel(**config), diffusers.SanaControlNetModel(**config)
    tensors = model.state_dict()
    assert sum(tensor.numel() for tensor in tensors.values()) == num_parameters
    assert len(tensors) == 162
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in upstream.state_dict().items()}
    assert model.to_json_string() == upstream.to_json_string()


def test_signatures_extend_those_of_diffusers():
    for method, more in (("__init__", ["qk_norm", "wiring", "timestep_scale"]), ("forward", ["text_context"])):
        ours, theirs = (
            [(name, p.default) for name, p in inspect.signature(getattr(cls, method)).parameters.items()]
            for cls in (SanaControlNetModel, diffusers.SanaControlNetModel)
        )
        assert ours[: len(theirs)] == theirs
        assert [name for name, _ in ours[len(theirs) :]] == more


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"interpolation_scale": 2.0, "sample_size": 16},
        {"patch_size": 2, "attention_bias": True, "norm_elementwise_affine": True, "mlp_ratio": 1.7},
    ],
    ids=["released", "4k", "unreleased"],
)
def test_equals_diffusers(overrides):
    model = tiny_controlnet(**overrides)
    inputs = tiny_control(model)
    assert_equal_outputs(outputs(model, inputs), outputs(diffusers_twin(model), inputs))
    (samples,) = model(**inputs, conditioning_scale=0.3, return_dict=False)
    assert_equal_outputs(samples, outputs(diffusers_twin(model), inputs, conditioning_scale=0.3))


def test_text_context_stands_for_the_text():
    model = tiny_controlnet()
    inputs = tiny_control(model)
    expected = outputs(model, inputs)
    text = inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask")
    with torch.no_grad():
        inputs |= {"encoder_hidden_states": None, "text_context": model.encode_text(*text)}
    assert_equal_outputs(outputs(model, inputs), expected)


def test_one_control_image_serves_the_batch():
    model = tiny_controlnet()
    inputs = tiny_control(model)
    one = inputs["controlnet_cond"][:1]
    assert_equal_outputs(
        outputs(model, inputs | {"controlnet_cond": one}),
        outputs(model, inputs | {"controlnet_cond": one.expand(2, -1, -1, -1)}),
    )


def test_gradients_equal_diffusers_and_survive_checkpointing():
    model = tiny_controlnet().train()
    twin, inputs, gradients = diffusers_twin(model), tiny_control(model), []
    for module in (twin, model, model):
        sum(sample.square().mean() for sample in module(**inputs).controlnet_block_samples).backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters()})
        module.zero_grad()
        model.enable_gradient_checkpointing()
    total = torch.stack([gradient.norm() for gradient in gradients[0].values()]).norm()
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-6 * total, name
        assert torch.equal(gradients[1][name], gradients[2][name]), name


@pytest.mark.parametrize("library", ["ours", "diffusers"])
def test_from_transformer(library):
    transformer = tiny_model("sana_1.5" if library == "ours" else "sana")
    source = transformer if library == "ours" else upstream_twin(transformer)
    model = SanaControlNetModel.from_transformer(source, num_layers=2)
    weights = transformer.state_dict()
    for key, value in model.state_dict().items():
        is_new = key.startswith(("input_block", "controlnet_blocks"))
        assert torch.equal(value, torch.zeros_like(value) if is_new else weights[key]), key
    assert model.config["qk_norm"] == transformer.config["qk_norm"]
    # It changes nothing, and its first step changes that.
    assert all(not sample.any() for sample in outputs(model, tiny_control(model)))
    other = SanaControlNetModel.from_transformer(source, 2, load_weights_from_transformer=False)
    assert not torch.equal(other.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_from_transformer_says_what_does_not_fit():
    transformer = tiny_model("sana")
    for number in (0, 3):
        with pytest.raises(ValueError, match=f"`num_layers` must be between 1 and 2.*got {number}"):
            SanaControlNetModel.from_transformer(transformer, number)
    with pytest.raises(ValueError, match="`guidance_embeds`"):
        SanaControlNetModel.from_transformer(tiny_model("sprint"), 2)
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"plain weights, but lacks 'transformer_blocks.0.attn1.to_q.weight'"):
        SanaControlNetModel.from_transformer(transformer, 2)


@pytest.mark.parametrize("transformer_of", ["ours", "diffusers"])
def test_steers_the_transformer_as_in_diffusers(transformer_of):
    base, model = tiny_model("sana"), tiny_controlnet()
    inputs, cond = tiny_inputs(base), tiny_control(model)["controlnet_cond"]
    rest = {name: value for name, value in inputs.items() if name != "hidden_states"}
    theirs = diffusers_twin(model)(**inputs, controlnet_cond=cond, return_dict=False)[0]
    with torch.no_grad():
        expected = upstream_twin(base)(**inputs, controlnet_block_samples=theirs).sample
        runner = base if transformer_of == "ours" else upstream_twin(base)
        samples = control(model, inputs["hidden_states"], torch.float32, controlnet_cond=cond, **rest)
        actual = runner(**inputs, controlnet_block_samples=samples).sample
        assert relative_error(actual, base(**inputs).sample) > STRENGTH
    assert_close_fp32(actual, expected)


@torch.no_grad()
def test_wiring_of_the_authors():
    """Against the formula, on diffusers' blocks: c_1 = B_1(x_0 + W c), x_i = block_i(x_i-1 + Z_i(c_i)) for i >= 1."""
    base, model = tiny_model("sana", num_layers=4), tiny_controlnet(wiring="nvlabs")
    inputs, cond = tiny_inputs(base), tiny_control(model)["controlnet_cond"]
    branch, twin, states = diffusers_twin(model), upstream_twin(base), {}

    def run(block, tokens, arguments):
        return block.forward(tokens, *arguments)

    def before(block, arguments, index):
        tokens, *rest = arguments
        if index == 1:
            states["c"] = tokens + branch.input_block(branch.patch_embed(cond))
        if 1 <= index <= 2:
            text = branch.caption_norm(branch.caption_projection(inputs["encoder_hidden_states"]))
            time, _ = branch.time_embed(inputs["timestep"], batch_size=2, hidden_dtype=torch.float32)
            own = (None, text, rest[2], time, *rest[4:])
            states["c"] = run(branch.transformer_blocks[index - 1], states["c"], own)
            tokens = tokens + branch.controlnet_blocks[index - 1](states["c"])
        return tokens, *rest

    for index, block in enumerate(twin.transformer_blocks):
        block.register_forward_pre_hook(partial(before, index=index))
    expected = twin(**inputs).sample
    rest = {name: value for name, value in inputs.items() if name != "hidden_states"}
    samples = control(model, inputs["hidden_states"], torch.float32, controlnet_cond=cond, **rest)
    assert_close_fp32(base(**inputs, controlnet_block_samples=samples).sample, expected)
    assert relative_error(expected, upstream_twin(base)(**inputs).sample) > STRENGTH


@pytest.mark.parametrize("writer", [SanaControlNetModel, diffusers.SanaControlNetModel], ids=["ours", "diffusers"])
def test_exchange_with_diffusers(writer, tmp_path):
    model = tiny_controlnet()
    saved = model if writer is SanaControlNetModel else diffusers_twin(model)
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "SanaControlNetModel"
    assert not config.keys() & {"qk_norm", "wiring", "timestep_scale"}  # of which diffusers would warn
    for reader in (SanaControlNetModel, diffusers.SanaControlNetModel):
        loaded, info = reader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert_equal_outputs(outputs(loaded, tiny_control(model)), outputs(model, tiny_control(model)))


def test_own_fields_are_saved(tmp_path):
    own = {"wiring": "nvlabs", "qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001}
    model = tiny_controlnet(**own)
    model.save_pretrained(tmp_path)
    loaded = SanaControlNetModel.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in own} == own
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_lora_equals_diffusers():
    model = tiny_controlnet()
    inputs, plain, twin = tiny_control(model), outputs(model, tiny_control(model)), diffusers_twin(model)
    for module in (model, twin):
        targets = ["to_q", "to_k", "to_v", "conv_point"]
        module.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    twin.load_state_dict(model.state_dict())
    for arguments in ({}, {"attention_kwargs": {"scale": 0.3}}):
        assert relative_error(outputs(model, inputs, **arguments)[-1], plain[-1]) > 1e-3
        assert_equal_outputs(outputs(model, inputs, **arguments), outputs(twin, inputs, **arguments))


def test_quantizes_the_blocks_and_leaves_its_ends():
    model = tiny_controlnet()
    inputs = tiny_control(model)
    expected = outputs(model, inputs)
    quantize(model, SVDQuantConfig(rank=4))
    assert hasattr(model.transformer_blocks[0].attn1.to_q, "qweight")
    assert type(model.controlnet_blocks[0]).__name__ == "Linear"
    for actual, other in zip(outputs(model, inputs), expected, strict=True):
        assert relative_error(actual, other) < 0.5


def test_set_attention_backend():
    model = tiny_controlnet()
    inputs = tiny_control(model)
    expected = outputs(model, inputs)
    model.set_attention_backend("_native_math")
    assert {processor._attention_backend for name, processor in model.attn_processors.items() if "attn2" in name} == {
        diffusers.models.attention_dispatch.AttentionBackendName._NATIVE_MATH
    }
    assert_equal_outputs(outputs(model, inputs), expected)
    model.reset_attention_backend()


@pytest.mark.parametrize("wiring", ["diffusers", "nvlabs"])
@torch.no_grad()
def test_compiles_as_one_graph(wiring):
    torch._dynamo.reset()
    base, model = tiny_model("sana", num_layers=2), tiny_controlnet(num_layers=1, wiring=wiring)
    inputs, cond = tiny_inputs(base), tiny_control(model)["controlnet_cond"]
    rest = {name: value for name, value in inputs.items() if name != "hidden_states"}

    def step(latents):
        samples = control(model, latents, torch.float32, controlnet_cond=cond, **rest)
        return base(latents, **rest, controlnet_block_samples=samples).sample

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    assert_close_fp32(compiled(inputs["hidden_states"]), step(inputs["hidden_states"]))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_states": torch.zeros(2, 4, 8, 7)}, r"`hidden_states` must be latents \[batch, 4, 8, 6\]"),
        ({"controlnet_cond": torch.zeros(2, 3, 8, 6)}, r"`controlnet_cond` must be latents \[batch, 4, .*VAE"),
        ({"controlnet_cond": torch.zeros(3, 4, 8, 6)}, "`controlnet_cond` must have batch size 2"),
        ({"attention_mask": torch.ones(2, 48)}, "`attention_mask` must be None"),
        ({"timestep": torch.tensor(5.0)}, r"`timestep` must have shape \(2,\)"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 8)}, "`encoder_hidden_states` must have shape"),
    ],
)
def test_bad_inputs(changes, match):
    model = tiny_controlnet()
    with pytest.raises(ValueError, match=match):
        model(**tiny_control(model) | changes)


def test_bad_configurations_and_wirings():
    with pytest.raises(ValueError, match=r"`wiring` must be one of .*got 'sd3'"):
        SanaControlNetModel(wiring="sd3")
    with pytest.raises(ValueError, match=r"`cross_attention_dim` must be.*got 48"):
        tiny_controlnet(cross_attention_dim=48)
    model = tiny_controlnet(wiring="nvlabs")
    with pytest.raises(ValueError, match=r"the output of the transformer's first block \[batch, 48, 32\]"):
        model(**tiny_control(model))
    assert tiny_config("sana")["num_layers"] > model.config["num_layers"]
