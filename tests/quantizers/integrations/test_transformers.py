"""`from_pretrained` and `save_pretrained` of quantized text encoders of transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    T5Config,
    T5EncoderModel,
    logging,
)
from transformers.quantizers.base import HfQuantizer

from diffusers_sana import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.api import quantize
from diffusers_sana.quantizers.svdquant.integrations.checkpoint import check_layers
from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layers
from tests import tiny
from tests.numerics import relative_error


IDS = torch.arange(1, 9)[None]
LAYER = "layers.0.mlp.up_proj"
WEIGHTS = "model.safetensors"


def t5() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def clip() -> CLIPTextModel:
    """Has biases."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return CLIPTextModel(config).eval()


def gemma3() -> Gemma3TextModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Gemma3TextModel(Gemma3TextConfig(**sizes | heads, sliding_window=4)).eval()


def qwen() -> Qwen2_5_VLModel:
    """With its vision tower."""
    torch.manual_seed(0)
    text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    positions = {"type": "mrope", "mrope_section": [1, 1, 2]}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    patches = {"patch_size": 2, "window_size": 8, "fullatt_block_indexes": [1]}
    tokens = {"vision_start_token_id": 46, "vision_end_token_id": 47, "video_token_id": 48, "image_token_id": 49}
    config = Qwen2_5_VLConfig(
        text_config=text | heads | special | {"rope_scaling": positions}, vision_config=vision | patches, **tokens
    )
    return Qwen2_5_VLModel(config).eval()


def image() -> dict[str, Tensor]:
    """An image of 4x4 patches between two words, for Qwen2.5-VL."""
    ids = torch.tensor([[3, 46, 49, 49, 49, 49, 47, 4]])
    pixels = torch.randn(16, 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[1, 4, 4]])
    return {"input_ids": ids, "mm_token_type_ids": (ids == 49).int(), "pixel_values": pixels, "image_grid_thw": grid}


# How to make each, and the layers that are quantized.
FAMILIES = {
    "gemma2": (tiny.text_encoder, 7),
    "gemma3": (gemma3, 42),
    "t5": (t5, 12),
    "clip": (clip, 12),
    "qwen2.5-vl": (qwen, 24),
}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    inputs = image() if isinstance(model, Qwen2_5_VLModel) else {"input_ids": IDS}
    return model(**inputs).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, dtype, tmp_path):
    make, layers = FAMILIES[family]
    model = make()
    model.save_pretrained(tmp_path / "original")
    load, config = type(model).from_pretrained, SVDQuantConfig(rank=4)
    quantized, info = load(tmp_path / "original", quantization_config=config, dtype=dtype, output_loading_info=True)
    tied = {"encoder.embed_tokens.weight"}  # of T5: transformers reports it missing, quantized or not
    assert not any(value and set(value) - tied for value in info.values())
    assert len(list(quantized_layers(quantized))) == layers
    assert config.modules is None
    result = output(quantized)
    assert result.dtype == dtype
    assert 0 < relative_error(result, output(model)) < 0.2

    quantized.save_pretrained(tmp_path / "quantized")
    again, info = load(tmp_path / "quantized", output_loading_info=True)  # in the dtype of the folder
    assert not any(value and set(value) - tied for value in info.values())
    assert torch.equal(output(again), result)
    for name, parameter in quantized.named_parameters():
        assert again.get_parameter(name).dtype == parameter.dtype
    second = load(tmp_path / "original", quantization_config=config, dtype=dtype)
    assert torch.equal(output(second), result)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    tiny.text_encoder().save_pretrained(folder)
    return folder


def load(folder, **arguments):
    return type(tiny.text_encoder()).from_pretrained(folder, **arguments)


@pytest.fixture
def saved(original, tmp_path):
    load(original, quantization_config=SVDQuantConfig(rank=4)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_what_the_library_asks(saved):
    model = load(saved)
    quantizer = model.hf_quantizer
    assert model.is_quantized
    assert model.quantization_method == "svdquant"
    assert isinstance(quantizer, HfQuantizer)
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
    assert quantizer.is_compileable
    recorded = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert recorded["quant_method"] == "svdquant"
    assert set(recorded["modules"].values()) == {"w4a16"}
    assert len(recorded["modules"]) == 7


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_in_memory(original, precision, dtype, tmp_path):
    """Also with activations in 4 bits, if one wants them."""
    model = load(original, dtype=dtype)
    modules = {"layers.*.mlp.*": "w4a4", "layers.*.self_attn.*": "w4a16"}
    config = SVDQuantConfig(rank=4, precision=precision, modules=modules)
    quantize(model, config, progress=False)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(output(again), output(model))
    assert [layer.precision for layer in quantized_layers(again)] == ["int4"] * 4 + [precision] * 3


def test_fused_ranks_are_kept(saved, tmp_path):
    model = load(saved)
    layer = model.get_submodule(LAYER)
    layer.add_to_weight(torch.randn(layer.out_features, 3) @ torch.randn(3, layer.in_features))
    model.save_pretrained(tmp_path / "fused")
    again = load(tmp_path / "fused")
    assert again.get_submodule(LAYER).rank == 7
    assert torch.equal(output(again), output(model))


def test_dtypes(saved):
    """transformers casts quantized models; codes and scales of ours come through."""
    model = load(saved)
    expected = output(model)
    assert relative_error(output(model.to(torch.bfloat16)), expected) < 0.05
    assert {layer.qweight.dtype for layer in quantized_layers(model)} == {torch.uint8}
    assert relative_error(output(load(saved, dtype=torch.bfloat16)), expected) < 0.05
    with pytest.raises(ValueError, match=r"`.half\(\)` is not supported for quantized model"):
        model.half()


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(original, saved, device_map):
    expected = output(load(saved))
    config = SVDQuantConfig(rank=4)
    assert torch.equal(output(load(original, quantization_config=config, device_map=device_map)), expected)
    assert torch.equal(output(load(saved, device_map=device_map)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization_config": SVDQuantConfig(rank=9)}, "`rank` must be at most 8"),
        ({"quantization_config": SVDQuantConfig(rank=4, modules={"nothing": "w4a4"})}, "'nothing' matches none"),
        ({"quantization_config": SVDQuantConfig(rank=4, gptq=True)}, "`gptq` must be False"),
        ({"quantization_config": SVDQuantConfig(rank=4), "device_map": {"": "disk"}}, "must not put layers on disk"),
    ],
)
def test_bad_arguments(original, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(original, **arguments)


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("qweight", None, f"lacks 1 tensors .*{LAYER}.qweight"),
        ("qweight", lambda x: x.float(), "qweight' must be torch.uint8 .*, got torch.float32"),
        ("qweight", lambda x: x[:-1], r"qweight' must be torch.uint8 of shape \[32, 32\], got .* \[31, 32\]"),
        ("wscales", lambda x: x.to(torch.float8_e4m3fn), "wscales' must be torch.float32"),
        ("proj_up", lambda x: x[:-1], r"proj_up' must be torch.float32 of shape \[32, 'rank'\], got .* \[31, 4\]"),
        ("proj_up", lambda x: x[:, :-1], rf"`proj_down` and `proj_up` of '{LAYER}' must be"),
    ],
)
def test_damaged_checkpoint(saved, leaf, change, message):
    tensors = load_file(saved / WEIGHTS)
    tensor = tensors.pop(f"{LAYER}.{leaf}")
    if change is not None:
        tensors[f"{LAYER}.{leaf}"] = change(tensor).contiguous()
    save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=message):
        load(saved)


def test_damaged_state_dict(saved):
    """Which the library takes in place of files, and older versions do not check."""
    tensors = load_file(saved / WEIGHTS)
    tensors[f"{LAYER}.wscales"] = tensors[f"{LAYER}.wscales"][:-1]
    config = type(tiny.text_encoder()).config_class.from_pretrained(saved)
    with pytest.raises((ValueError, RuntimeError), match=r"wscales' must be torch.float32|ignore_mismatched_sizes"):
        load(None, config=config, state_dict=tensors)


@pytest.mark.parametrize("part", ["qweight", "wscales", "wtscale", "smooth_factor", "proj_down", "bias"])
def test_parts_that_do_not_fit(part):
    """Whatever a library has put into the layers."""
    model = clip()
    quantize(model, SVDQuantConfig(rank=4, precision="nvfp4", modules={"*": "w4a4"}), progress=False)
    check_layers(model)
    layer = next(quantized_layers(model))
    setattr(layer, part, nn.Parameter(getattr(layer, part)[..., :-1].clone(), requires_grad=False))
    with pytest.raises(ValueError, match=rf"`{part}` and|\.{part}' must be torch\."):
        check_layers(model)


@pytest.mark.parametrize("change", [lambda x: x.fill_(torch.nan), None])
def test_damaged_original(original, change, tmp_path):
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / WEIGHTS)
    weight = tensors.pop(f"{LAYER}.weight")
    if change is not None:
        tensors[f"{LAYER}.weight"] = change(weight)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"lacks 1 tensors|conversion of the weights"):
        load(tmp_path, quantization_config=SVDQuantConfig(rank=4))
