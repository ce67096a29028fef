"""`load_lora_weights` with different trainers' files: the picture is that of the same LoRA in diffusers' format."""

import copy

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import diffusers_sana
from tests.loaders.lora_files import FORMATS, by_authors_names, pipeline, plain, random_lora, written
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
    picture = draw(base)
    base.unload_lora_weights()
    assert not torch.allclose(picture, draw(base), atol=0.1)
    return picture


def draw(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "output_type": "latent", "complex_human_instruction": None}
    return pipe("a fox", height=32, width=32, use_resolution_binning=False, generator=generator, **settings).images


def test_diffusers_draws_the_expected(base, lora, expected):
    upstream = pipeline(diffusers)
    upstream.load_lora_weights(plain(lora))
    assert torch.allclose(draw(upstream), expected, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_file(pipe, lora, expected, name, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(FORMATS[name](lora), path)
    pipe.load_lora_weights(path)
    assert torch.equal(draw(pipe), expected)


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
        assert torch.equal(draw(pipe), expected)


def test_in_memory_beside_another_and_hotswapped(pipe, lora, expected):
    pipe.load_lora_weights(FORMATS["kohya"](random_lora(pipe.transformer, seed=1)), adapter_name="other")
    pipe.load_lora_weights(FORMATS["ComfyUI"](lora), adapter_name="this")
    pipe.set_adapters("this")
    assert torch.equal(draw(pipe), expected)
    pipe.set_adapters("other")
    assert not torch.allclose(draw(pipe), expected, atol=0.1)
    pipe.load_lora_weights(FORMATS["OneTrainer"](lora), adapter_name="other", hotswap=True)
    assert torch.equal(draw(pipe), expected)


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
    assert torch.equal(draw(pipe), expected)


def test_on_4_bits(lora):
    pipe = pipeline(diffusers_sana)
    quantized(pipe.transformer)
    pictures = [draw(pipe)]
    for state_dict in (plain(lora), FORMATS["ComfyUI"](lora)):
        pipe.load_lora_weights(state_dict)
        pictures.append(draw(pipe))
        pipe.unload_lora_weights()
    assert not torch.allclose(pictures[0], pictures[1], atol=0.1)
    assert torch.equal(pictures[1], pictures[2])


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
    picture = draw(pipe)
    assert torch.allclose(picture, draw(diffusers_sana.SanaPipeline.from_pipe(pipe, transformer=expected)), atol=1e-4)


def test_of_another_size(pipe):
    larger = pipeline(diffusers_sana, num_attention_heads=3, num_cross_attention_heads=3, cross_attention_dim=96)
    with pytest.raises(
        ValueError, match=r"'transformer.patch_embed.proj.lora_B.weight' must have 64 at axis 0.*\[96, "
    ):
        pipe.load_lora_weights(FORMATS["kohya"](random_lora(larger.transformer)))
    deeper = pipeline(diffusers_sana, num_layers=3)
    with pytest.raises(ValueError, match=r"which has no 'transformer_blocks.2.attn1.to_q'"):
        pipe.load_lora_weights(FORMATS["ComfyUI"](random_lora(deeper.transformer)))
    assert not pipe.get_active_adapters()


def test_pickles_are_not_loaded(pipe, tmp_path):
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(OSError, match="safetensors"):
        pipe.load_lora_weights(tmp_path)


def test_no_pickles(pipe, tmp_path):
    (tmp_path / "lora.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"`weight_name` must be a safetensors file, got 'lora.bin'"):
        pipe.load_lora_weights(tmp_path, weight_name="lora.bin")
