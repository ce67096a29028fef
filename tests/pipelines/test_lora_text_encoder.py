"""Adapters of the text encoder, in the files of trainers that train it, alone or with the transformer."""

import copy
import logging
from functools import partial

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import Gemma2Model

import diffusers_sana
from tests import tiny
from tests.loaders.lora.adapter_kinds import KINDS
from tests.loaders.lora.lora_files import pipeline
from tests.numerics import assert_close_fp32
from tests.quantizers.lora_cases import bits, dense_twin, quantized, same_bits


TEXT = ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")
IMAGE = "transformer_blocks.0.attn1.to_q"
# Prefix and separator. OneTrainer: Diffusers and its backups, Kohya, before July 2026; LyCORIS on both models, or on
# the text encoder alone; the names that ComfyUI has for Gemma 2, whose head holds the model.
STYLES = {
    "OneTrainer": ("text_encoder.", "."),
    "OneTrainer, Kohya": ("lora_te_", "_"),
    "OneTrainer before July 2026": ("lora_te.", "."),
    "LyCORIS": ("lycoris_te_", "_"),
    "LyCORIS, alone": ("lycoris_", "_"),
    "kohya, with a head": ("lora_te1_model_", "_"),
    "ComfyUI": ("text_encoders.gemma2_2b.transformer.model.", "."),
}


def make_pipeline():
    pipe = pipeline(diffusers_sana)
    torch.manual_seed(0)
    pipe.text_encoder = Gemma2Model(tiny.text_config(num_hidden_layers=2, head_dim=16)).eval()
    return pipe


@pytest.fixture(scope="module")
def base():
    return make_pipeline()


@pytest.fixture
def pipe(base):
    before = bits(base.text_encoder)
    yield base
    base.unload_lora_weights()
    base.text_encoder.load_state_dict(before)  # fusing rounds


@torch.no_grad()
def encode(encoder):
    return encoder(torch.arange(8)[None] + 3, use_cache=False)[0]


def adapter(encoder, kind="LoRA", style="OneTrainer", seed=0):
    """A file, and the text encoder with the changed weights."""
    torch.manual_seed(seed)
    file, changed = {}, copy.deepcopy(encoder)
    prefix, separator = STYLES[style]
    for name in TEXT:
        layer = changed.get_submodule(name)
        tensors, layer.weight.data = KINDS[kind].make(layer.weight.detach())
        stem = prefix + name.replace(".", separator)
        file |= {f"{stem}.{ending}": tensor for ending, tensor in tensors.items()}
    return file, changed


def image_adapter(pipe):
    """A file for the transformer."""
    torch.manual_seed(1)
    tensors, _ = KINDS["LoRA"].make(pipe.transformer.get_submodule(IMAGE).weight.detach())
    return {f"transformer.{IMAGE}.{ending}": x for ending, x in tensors.items()}


@pytest.mark.parametrize("style", STYLES)
def test_with_the_transformer(pipe, style):
    encoder, before = pipe.text_encoder, encode(pipe.text_encoder)
    file, changed = adapter(encoder, style=style)
    pipe.load_lora_weights(file | image_adapter(pipe), "both")
    assert pipe.get_list_adapters() == {"transformer": ["both"], "text_encoder": ["both"]}
    assert_close_fp32(encode(encoder), encode(changed))
    pipe.set_adapters("both", {"transformer": 1.0, "text_encoder": 0.0})
    assert torch.equal(encode(encoder), before)
    pipe.set_adapters("both")
    pipe.disable_lora()
    assert torch.equal(encode(encoder), before)
    pipe.enable_lora()
    assert_close_fp32(encode(encoder), encode(changed))
    pipe.unload_lora_weights()
    assert torch.equal(encode(encoder), before)
    assert not any("lora" in name for name, _ in encoder.named_modules())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "LoRA"])
def test_other_kinds_alone(pipe, kind):
    """The file has nothing for the transformer."""
    file, changed = adapter(pipe.text_encoder, kind)
    pipe.load_lora_weights(file, adapter_name="text")
    assert pipe.get_list_adapters() == {"text_encoder": ["text"]}
    assert_close_fp32(encode(pipe.text_encoder), encode(changed))
    pipe.fuse_lora()
    assert_close_fp32(encode(pipe.text_encoder), encode(changed))
    pipe.unfuse_lora()
    assert_close_fp32(encode(pipe.text_encoder), encode(changed))


def test_written_by_peft(pipe, tmp_path):
    """Around the text encoder alone, with the scale in `adapter_config.json`."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "o_proj"], use_rslora=True)
    model = get_peft_model(copy.deepcopy(pipe.text_encoder), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = encode(model.base_model.model)
    assert not torch.allclose(expected, encode(pipe.text_encoder), atol=1e-2)
    model.save_pretrained(tmp_path)
    pipe.load_lora_weights(tmp_path)
    assert_close_fp32(encode(pipe.text_encoder), expected)


@pytest.mark.parametrize("kind", ["LoRA", "OFT, outputs"])
def test_on_4_bits(kind):
    pipe = make_pipeline()
    quantized(pipe.text_encoder)
    stored, before = bits(pipe.text_encoder), encode(pipe.text_encoder)
    file, changed = adapter(dense_twin(pipe.text_encoder), kind)
    pipe.load_lora_weights(file)
    assert not torch.allclose(before, encode(changed), atol=1e-2)
    assert_close_fp32(encode(pipe.text_encoder), encode(changed))
    pipe.fuse_lora()
    if kind == "LoRA":
        assert_close_fp32(encode(pipe.text_encoder), encode(changed))
    pipe.unfuse_lora()
    assert_close_fp32(encode(pipe.text_encoder), encode(changed))
    pipe.unload_lora_weights()
    assert same_bits(bits(pipe.text_encoder), stored)


def test_saved_again(pipe, tmp_path):
    """One alpha for each model, in the metadata of one file."""
    file, changed = adapter(pipe.text_encoder, "LoRA")
    pipe.load_lora_weights(file | image_adapter(pipe), "first")
    models = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(m, adapter_name="first") for name, m in models.items()}
    fields = {f"{name}_lora_adapter_metadata": m.peft_config["first"].to_dict() for name, m in models.items()}
    pipe.save_lora_weights(tmp_path, **layers, **fields)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, adapter_name="again")
    assert pipe.get_list_adapters() == {"transformer": ["again"], "text_encoder": ["again"]}
    assert_close_fp32(encode(pipe.text_encoder), encode(changed))
    with pytest.raises(ValueError, match="`transformer_lora_layers` or `text_encoder_lora_layers` must be given"):
        pipe.save_lora_weights(tmp_path)


def test_several(pipe):
    """Two files without names, one for each model, are two adapters; each can be scaled, and deleted."""
    text, changed = adapter(pipe.text_encoder)
    pipe.load_lora_weights(text)
    pipe.load_lora_weights(image_adapter(pipe))
    assert pipe.get_list_adapters() == {"transformer": ["default_1"], "text_encoder": ["default_0"]}
    before = encode(copy.deepcopy(pipe.text_encoder))
    pipe.set_adapters(["default_0", "default_1"], [0.5, 1.0])
    half = copy.deepcopy(changed)
    for name in TEXT:
        layer = half.get_submodule(name)
        own = pipe.text_encoder.get_submodule(name).get_base_layer().weight
        layer.weight.data = own + 0.5 * (layer.weight - own)
    assert_close_fp32(encode(pipe.text_encoder), encode(half))
    pipe.set_adapters("default_1")
    pipe.delete_adapters("default_0")
    assert pipe.get_list_adapters() == {"transformer": ["default_1"]}
    assert not torch.equal(encode(pipe.text_encoder), before)


def test_prompts_are_encoded_again(pipe):
    """What is remembered of prompts belongs to the encoder without the adapter."""

    def features(**options):
        return pipe.encode_prompt("a fox", complex_human_instruction=None, **options)[0]

    plain = features()
    pipe.load_lora_weights(adapter(pipe.text_encoder)[0])
    beside = features()
    assert not torch.allclose(plain, beside)
    assert_close_fp32(features(lora_scale=0.0), plain)
    pipe.fuse_lora()
    assert_close_fp32(features(), beside)
    pipe.unload_lora_weights()  # which keeps what is fused
    assert_close_fp32(features(), beside)


@pytest.mark.parametrize("kind", ["sequential", "group"])
def test_beside_offloading(monkeypatch, kind):
    """The hooks are taken off while layers are replaced, and come back, on those of the adapter too."""
    pipe = make_pipeline()
    file, changed = adapter(pipe.text_encoder)
    expected = encode(changed)
    if kind == "sequential":
        enable = partial(pipe.enable_sequential_cpu_offload, device="cpu")
        monkeypatch.setattr(pipe, "enable_sequential_cpu_offload", enable)
        enable()
    else:
        cpu = torch.device("cpu")
        apply_group_offloading(pipe.text_encoder, cpu, cpu, offload_type="leaf_level")
    pipe.load_lora_weights(file)
    down = pipe.text_encoder.get_submodule(TEXT[0]).lora_A["default_0"]
    assert hasattr(down, "_hf_hook" if kind == "sequential" else "_diffusers_hook")
    if kind == "group":  # accelerate cannot offload Gemma's embeddings from a CPU
        assert_close_fp32(encode(pipe.text_encoder), expected)


def test_refused(pipe, caplog):
    file, _ = adapter(pipe.text_encoder)
    both = file | image_adapter(pipe)
    deeper = {key.replace("layers.0", "layers.7"): x for key, x in both.items()}
    with pytest.raises(ValueError, match=r"'text_encoder.layers.7.self_attn.q_proj.lora_A.weight' .*has no 'layers.7"):
        pipe.load_lora_weights(deeper)
    assert not pipe.get_list_adapters()  # nor in the transformer
    with pytest.raises(ValueError, match=r"must have size 32 in axis 1 for this model, got the shape \[3, 16\]"):
        pipe.load_lora_weights({key.replace("mlp.up_proj", "mlp.down_proj"): x for key, x in file.items()})
    pipe.load_lora_weights(both, adapter_name="both")
    with pytest.raises(ValueError, match="`hotswap` swaps adapters of the transformer only"):
        pipe.load_lora_weights(both, adapter_name="both", hotswap=True)
    pipe.load_lora_weights(image_adapter(pipe), adapter_name="both", hotswap=True)
    with pytest.raises(ValueError, match="the text encoder has an adapter 'both'"):
        pipe.load_lora_weights(file, adapter_name="both")
    pipe.unload_lora_weights()
    with caplog.at_level(logging.WARNING):
        bare = diffusers_sana.SanaPipeline.from_pipe(pipe, text_encoder=None, tokenizer=None)
        bare.load_lora_weights(both)
    assert "also changes the text encoder (4 tensors), which this pipeline does not have" in caplog.text
    assert bare.get_list_adapters() == {"transformer": ["default_0"]}


def test_nothing_for_the_text_encoder(pipe, caplog):
    """By diffusers' call for the text encoder alone: its warning."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        pipe.load_lora_into_text_encoder({"lora_foo": torch.tensor(2.0)}, text_encoder=pipe.text_encoder)
    finally:
        logger.removeHandler(caplog.handler)
    assert "No LoRA keys associated to Gemma2Model" in caplog.text
    file, changed = adapter(pipe.text_encoder)
    converted = pipe.lora_state_dict(file)
    pipe.load_lora_into_text_encoder(
        converted, text_encoder=pipe.text_encoder, metadata={"text_encoder.lora_alpha": 6}
    )
    assert_close_fp32(encode(pipe.text_encoder), encode(changed))
