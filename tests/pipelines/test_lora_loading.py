"""`load_lora_weights` with different trainers' files: the image is that of the same LoRA in diffusers' format."""

import copy

import diffusers
import pytest
import torch
from diffusers.utils import logging
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import diffusers_sana
from diffusers_sana.models.transformers.lora_layers import check_can_be_fused
from tests.loaders.lora.lora_files import FORMATS, by_authors_names, pipeline, plain, random_lora, written
from tests.quantizers.lora_cases import quantized


@pytest.fixture(scope="module")
def base():
    return pipeline(diffusers_sana)


@pytest.fixture
def pipe(base):
    yield base
    base.unload_lora_weights()


@pytest.fixture(scope="module")
def lora(base):
    return random_lora(base.transformer)


@pytest.fixture(scope="module")
def expected(base, lora):
    base.load_lora_weights(plain(lora))
    image = generate(base)
    base.unload_lora_weights()
    assert not torch.allclose(image, generate(base), atol=0.1)
    return image


def generate(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "output_type": "latent", "complex_human_instruction": None}
    return pipe("a fox", height=32, width=32, use_resolution_binning=False, generator=generator, **settings).images


def test_diffusers_generates_the_expected(base, lora, expected):
    upstream = pipeline(diffusers)
    upstream.load_lora_weights(plain(lora))
    assert torch.allclose(generate(upstream), expected, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_file(pipe, lora, expected, name, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(FORMATS[name](lora), path)
    pipe.load_lora_weights(path)
    assert torch.equal(generate(pipe), expected)


def test_folder_of_peft(pipe, lora, expected, tmp_path):
    """Written by PEFT itself, which keeps the scales in `adapter_config.json`."""
    config = LoraConfig(
        r=2,
        lora_alpha=1,
        target_modules=list(lora),
        rank_pattern={"conv_point": 4},
        alpha_pattern={r"attn2\.to_\w+(\.0)?": 0.5},
    )
    model = get_peft_model(copy.deepcopy(pipe.transformer), config)
    for name, (down, up, _) in lora.items():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = down, up
    model.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        pipe.load_lora_weights(source, adapter_name=source.stem)
        pipe.set_adapters(source.stem)
        assert torch.equal(generate(pipe), expected)


def test_in_memory_beside_another_and_hotswapped(pipe, lora, expected):
    pipe.load_lora_weights(FORMATS["kohya"](random_lora(pipe.transformer, seed=1)), adapter_name="other")
    pipe.load_lora_weights(FORMATS["ComfyUI"](lora), adapter_name="this")
    pipe.set_adapters("this")
    assert torch.equal(generate(pipe), expected)
    pipe.set_adapters("other")
    assert not torch.allclose(generate(pipe), expected, atol=0.1)
    pipe.load_lora_weights(FORMATS["OneTrainer"](lora), adapter_name="other", hotswap=True)
    assert torch.equal(generate(pipe), expected)


def test_hotswap_leaves_the_tensors_of_the_caller(pipe, lora):
    """Also where the rank rises."""
    # PEFT hotswaps only where the patterns of ranks are equal, and cannot swap tensors that have views.
    layers = {key: x.clone() for key, x in plain(lora).items() if "conv_point" not in key}
    low = {key: (x[:1] if ".lora_A." in key else x[:, :1]).clone() for key, x in layers.items()}
    pipe.load_lora_weights(layers, adapter_name="two")
    expected = generate(pipe)
    pipe.unload_lora_weights()
    before = copy.deepcopy(layers)
    pipe.load_lora_weights(low, adapter_name="one")
    pipe.load_lora_weights(layers, adapter_name="one", hotswap=True)
    assert torch.equal(generate(pipe), expected)
    assert all(torch.equal(layers[key], before[key]) for key in before)


def test_scales_are_saved_again(pipe, lora, expected, tmp_path):
    """diffusers writes alphas into the file's metadata when it is given them."""
    pipe.load_lora_weights(FORMATS["kohya"](lora), adapter_name="default")
    layers = get_peft_model_state_dict(pipe.transformer)
    metadata = pipe.transformer.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    pipe.unload_lora_weights()
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    name = "transformer_blocks.0.attn1.to_q"
    assert torch.equal(saved[f"transformer.{name}.lora_B.weight"], lora[name][1])  # not rounded by a scale
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(generate(pipe), expected)


def test_on_4_bits(lora):
    pipe = pipeline(diffusers_sana)
    quantized(pipe.transformer)
    images = [generate(pipe)]
    for state_dict in (plain(lora), FORMATS["ComfyUI"](lora)):
        pipe.load_lora_weights(state_dict)
        images.append(generate(pipe))
        pipe.unload_lora_weights()
    assert not torch.allclose(images[0], images[1], atol=0.1)
    assert torch.equal(images[1], images[2])


def test_dora(pipe, lora):
    """Each row of the changed weight has the length that the file says (arXiv 2402.09353, by outputs)."""
    linear = {name: layer for name, layer in lora.items() if ".attn" in name}
    magnitudes = {}
    expected = copy.deepcopy(pipe.transformer)
    for name, (down, up, alpha) in linear.items():
        magnitudes[name] = torch.rand(len(up)) + 0.5
        layer = expected.get_submodule(name)
        changed = layer.weight.data + alpha / len(down) * up @ down
        layer.weight.data = magnitudes[name][:, None] * changed / changed.norm(dim=1, keepdim=True)
    rows = {name: (down, magnitudes[name][:, None], alpha) for name, (down, _, alpha) in linear.items()}
    state_dict = written(by_authors_names(linear), "lora_unet_", "_")
    for name, (_, magnitude, _) in by_authors_names(rows).items():
        state_dict[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = magnitude
    pipe.load_lora_weights(state_dict)
    image = generate(pipe)
    assert torch.allclose(
        image, generate(diffusers_sana.SanaPipeline.from_pipe(pipe, transformer=expected)), atol=1e-4
    )


def test_of_another_size(pipe):
    larger = pipeline(diffusers_sana, num_attention_heads=3, num_cross_attention_heads=3, cross_attention_dim=96)
    with pytest.raises(
        ValueError,
        match=r"'transformer.patch_embed.proj.lora_B.weight' must have size 64 in axis 0.*\[96, .* another width",
    ):
        pipe.load_lora_weights(FORMATS["kohya"](random_lora(larger.transformer)))
    deeper = pipeline(diffusers_sana, num_layers=3)
    with pytest.raises(ValueError, match=r"which has no 'transformer_blocks.2.attn1.to_q'"):
        pipe.load_lora_weights(FORMATS["ComfyUI"](random_lora(deeper.transformer)))
    assert not pipe.get_active_adapters()


class Mark:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("weight_name", [None, "lora.bin"])
def test_bin_files_are_read_and_never_run(pipe, lora, expected, weight_name, tmp_path):
    torch.save(plain(lora), tmp_path / "lora.bin")
    pipe.load_lora_weights(tmp_path, weight_name=weight_name)
    assert torch.equal(generate(pipe), expected)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, weight_name=weight_name, use_safetensors=False)
    assert torch.equal(generate(pipe), expected)
    pipe.unload_lora_weights()
    if weight_name is None:
        with pytest.raises(OSError, match="safetensors"):
            pipe.load_lora_weights(tmp_path, use_safetensors=True)
    torch.save({"a.lora_A.weight": Mark(tmp_path / "was_run")}, tmp_path / "lora.bin")
    with pytest.raises(OSError, match=r"lora\.bin"):
        pipe.load_lora_weights(tmp_path, weight_name=weight_name)
    assert not (tmp_path / "was_run").exists()


def test_nothing_of_a_model_is_warned_of(pipe, expected, caplog):
    logging.get_logger("diffusers").addHandler(caplog.handler)
    try:
        pipe.load_lora_weights({"lora_foo": torch.tensor(2.0)})
    finally:
        logging.get_logger("diffusers").removeHandler(caplog.handler)
    assert "No LoRA keys associated to SanaTransformer2DModel" in caplog.text
    assert not torch.equal(generate(pipe), expected)


def test_an_argument_that_nobody_obeys(pipe, lora):
    with pytest.raises(TypeError, match="`weight_names` is no argument of `load_lora_weights`"):
        pipe.load_lora_weights(plain(lora), weight_names="lora.safetensors")


class Depthwise(torch.nn.Module):
    """A depthwise convolution with another beside it: `scale * up(down(x))`, which OneTrainer adds to all channels."""

    def __init__(self, base, down, up, scale):
        super().__init__()
        self.base, self.factors, self.scale = base, (down, up), scale

    def forward(self, x):
        down, up = self.factors
        conv = torch.nn.functional.conv2d
        inside = conv(x, down, padding=1, groups=x.shape[1] // down.shape[1])
        return self.base(x) + self.scale * conv(inside, up, groups=len(down) // up.shape[1])


def beside_depthwise(pipe, layers):
    """A pipeline whose transformer has the LoRA of its depthwise convolutions built in."""
    transformer = copy.deepcopy(pipe.transformer)
    for name, (down, up, alpha) in layers.items():
        parent, child = name.rsplit(".", 1)
        layer = Depthwise(transformer.get_submodule(name), down, up, alpha / len(down))
        setattr(transformer.get_submodule(parent), child, layer)
    return diffusers_sana.SanaPipeline.from_pipe(pipe, transformer=transformer)


ONE_TRAINER = ["OneTrainer", "OneTrainer's backups", "kohya", "OneTrainer, original", "ComfyUI"]


@pytest.mark.parametrize("name", ONE_TRAINER)
def test_depthwise_layers_as_one_trainer_writes_them(pipe, name):
    every = random_lora(pipe.transformer, depthwise=True)
    depthwise = {layer: factors for layer, factors in every.items() if layer.endswith("conv_depth")}
    assert len(depthwise) == pipe.transformer.config.num_layers
    reference = generate(beside_depthwise(pipe, depthwise))
    assert not torch.allclose(reference, generate(pipe), atol=0.05)
    pipe.load_lora_weights(FORMATS[name](depthwise))
    assert torch.allclose(generate(pipe), reference, atol=1e-4)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(FORMATS[name](every))
    images = generate(pipe)
    pipe.load_lora_weights(plain({layer: factors for layer, factors in every.items() if layer not in depthwise}))
    assert not torch.allclose(generate(pipe), images, atol=0.01)  # the depthwise ones took part


@pytest.mark.parametrize("form", ["dense", "PEFT", "own weights", "LyCORIS"])
def test_other_forms_of_depthwise_layers(pipe, form, tmp_path):
    name = "transformer_blocks.1.ff.conv_depth"
    channels = pipe.transformer.get_submodule(name).out_channels
    shapes = {
        "dense": ((3, channels), (channels, 3)),
        "PEFT": ((channels, channels), (channels, 1)),
        "own weights": ((channels, 1), (channels, 1)),
        "LyCORIS": ((3, 1), (channels, 3)),
    }[form]
    torch.manual_seed(0)
    down, up = torch.randn(*shapes[0], 3, 3) * 0.2, torch.randn(*shapes[1], 1, 1) * 0.2
    layers = {name: (down, up, 2.0)}
    if form == "LyCORIS":  # a product of the layer's own weights
        weight = (up.flatten(1) @ down.flatten(1)).reshape(channels, 1, 3, 3)
        layers_built = {name: (weight, torch.ones(channels, 1, 1, 1), 2.0 * channels / 3)}
    before = generate(pipe)
    reference = generate(beside_depthwise(pipe, layers_built if form == "LyCORIS" else layers))
    pipe.load_lora_weights(written(layers, "lycoris_", "_"), adapter_name="depthwise")
    assert torch.allclose(generate(pipe), reference, atol=1e-4)

    state_dict = get_peft_model_state_dict(pipe.transformer, adapter_name="depthwise")
    metadata = pipe.transformer.peft_config["depthwise"].to_dict()
    pipe.save_lora_weights(tmp_path, state_dict, transformer_lora_adapter_metadata=metadata)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), before)
    pipe.load_lora_weights(tmp_path, adapter_name="again")
    assert torch.allclose(generate(pipe), reference, atol=1e-4)
    weight = pipe.transformer.get_submodule(name).get_base_layer().weight.detach().clone()
    if form in ("own weights", "LyCORIS"):
        pipe.fuse_lora(components=["transformer"], safe_fusing=True)
        assert torch.allclose(generate(pipe), reference, atol=1e-4)
        pipe.unfuse_lora(components=["transformer"])
        assert torch.allclose(pipe.transformer.get_submodule(name).get_base_layer().weight, weight, atol=1e-6)
        pipe.transformer.get_submodule(name).get_base_layer().weight.data = weight


def test_a_depthwise_lora_cannot_be_fused_and_nothing_is(pipe):
    """It is refused before any layer is changed."""
    every = random_lora(pipe.transformer, depthwise=True)
    pipe.load_lora_weights(FORMATS["OneTrainer"](every), adapter_name="every")
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with pytest.raises(ValueError, match=r"adapter 'every' mixes the channels of a depthwise convolution"):
        pipe.fuse_lora(components=["transformer"])
    assert all(torch.equal(weights[name], value) for name, value in pipe.transformer.state_dict().items())
    own = copy.deepcopy(pipe.transformer)
    check_can_be_fused(own, ["another"])
    own.set_adapters("every", 0.0)
    with pytest.raises(ValueError, match="'every' mixes the channels"):
        check_can_be_fused(own)


def test_two_loras_with_depthwise_layers(pipe):
    first, second = (random_lora(pipe.transformer, seed, depthwise=True) for seed in (0, 1))
    images = {}
    for name, layers in (("first", first), ("second", second)):
        pipe.load_lora_weights(FORMATS["kohya"](layers), adapter_name=name)
        images[name] = generate(pipe)
        pipe.unload_lora_weights()
    for name, layers in (("first", first), ("second", second)):
        pipe.load_lora_weights(FORMATS["kohya"](layers), adapter_name=name)
    for name, expected in images.items():
        pipe.set_adapters(name)
        assert torch.equal(generate(pipe), expected)
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    assert torch.allclose(generate(pipe), images["first"], atol=1e-5)
    pipe.delete_adapters("second")
    pipe.set_adapters("first")
    assert torch.equal(generate(pipe), images["first"])
    pipe.load_lora_weights(FORMATS["kohya"](second), adapter_name="first", hotswap=True)
    assert torch.equal(generate(pipe), images["second"])


def test_depthwise_factors_that_fit_no_form(pipe):
    name = "transformer_blocks.0.ff.conv_depth"
    before = generate(pipe)
    channels = pipe.transformer.get_submodule(name).out_channels
    for down, up, message in (
        (torch.ones(2, channels, 3, 3), torch.ones(channels // 2, 2, 1, 1), f"must have size {channels} in axis 0"),
        (torch.ones(2, channels, 1, 1), torch.ones(1, 2, 1, 1), r"must have the axes \[3, 3\] after the second"),
        (torch.ones(4, channels, 3, 3), torch.ones(1, 2, 1, 1), "one of the forms of LoRA for a depthwise"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(written({name: (down, up, 1.0)}, "transformer."))
    assert type(pipe.transformer.get_submodule(name)) is type(
        pipe.transformer.get_submodule("transformer_blocks.1.ff.conv_depth")
    )
    assert torch.equal(generate(pipe), before)


def test_a_depthwise_convolution_that_peft_has_wrapped(pipe):
    """By a training, for instance: PEFT's own form fits beside it, another has no room."""
    name = "transformer_blocks.0.ff.conv_depth"
    channels = pipe.transformer.get_submodule(name).out_channels
    pipe.transformer.add_adapter(LoraConfig(r=channels, target_modules=[name]), adapter_name="trained")
    down = torch.ones(channels, channels, 3, 3)
    pipe.load_lora_weights(written({name: (down, torch.ones(channels, 1, 1, 1), 1.0)}, "transformer."), "peft")
    with pytest.raises(ValueError, match=r"has an adapter that this pipeline did not load"):
        pipe.load_lora_weights(written({name: (down[:4], torch.ones(1, 4, 1, 1), 1.0)}, "transformer."), "other")


def test_depthwise_layers_on_4_bits():
    pipe = pipeline(diffusers_sana)
    every = random_lora(pipe.transformer, depthwise=True)
    depthwise = {layer: factors for layer, factors in every.items() if layer.endswith("conv_depth")}
    quantized(pipe.transformer)
    before = generate(pipe)
    reference = generate(beside_depthwise(pipe, depthwise))
    pipe.load_lora_weights(FORMATS["kohya"](depthwise))
    assert torch.allclose(generate(pipe), reference, atol=1e-4)
    assert not torch.allclose(before, reference, atol=0.01)
