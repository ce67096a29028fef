"""Files of Nunchaku, written by the formulas of the format, come out as the numbers that went in."""

import json
from functools import cache

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from diffusers_sana.loaders.nunchaku.load import load_nunchaku
from diffusers_sana.loaders.quantized.hub import export_quantized
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantConv2d, SVDQuantLayer
from tests.loaders.nunchaku import nunchaku_files as files
from tests.loaders.quantized.tiny_models import as_bytes
from tests.numerics import assert_close_fp32, relative_error


MODELS = {
    "flux": (lambda: files.flux(2, 64), files.flux_file),
    "flux-192": (lambda: files.flux(6, 32), files.flux_file),
    "sana": (files.sana, files.sana_file),
}


@cache
def case(name, precision):
    """The 16-bit model, the tensors of a file made from it, and what they stand for."""
    torch.manual_seed(0)
    build, to_file = MODELS[name]
    model = build()
    return model, *to_file(model, precision)


@pytest.fixture
def sana(tmp_path):
    model, tensors, _ = case("sana", "int4")
    return lambda changes=(), **metadata: files.write(
        tmp_path / "file.safetensors", {**tensors, **dict(changes)}, model, **metadata
    )


def test_options_for_the_hub_of_a_file_that_is_here(sana):
    with pytest.raises(
        TypeError, match=r"`torch_type` is neither an argument here nor one of `huggingface_hub\.hf_hub_d"
    ):
        load_nunchaku(sana(), torch_type=torch.bfloat16)
    load_nunchaku(sana(), revision="main", token=None, proxies={})


def inputs(model):
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    if isinstance(model, diffusers.SanaTransformer2DModel):
        return {
            "hidden_states": randn(2, 4, 8, 8),
            "encoder_hidden_states": randn(2, 5, 16),
            "timestep": torch.ones(2),
        }
    return {
        "hidden_states": randn(1, 12, 16),
        "encoder_hidden_states": randn(1, 5, 32),
        "pooled_projections": randn(1, 16),
        "timestep": torch.ones(1),
        "img_ids": randn(12, 3),
        "txt_ids": torch.zeros(5, 3),
    }


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers(name, precision, tmp_path):
    """Every weight and bias, the output of the model, and closeness to the weights before quantization."""
    original, tensors, meant = case(name, precision)
    path = files.write(tmp_path / "file.safetensors", tensors, original)
    model = load_nunchaku(path, dtype=torch.float32)
    assert type(model) is type(original)
    assert not model.training
    layers = {key: module for key, module in model.named_modules() if isinstance(module, SVDQuantLayer)}
    assert len(layers) == (16 if name == "sana" else 34)
    for key, expected in meant.items():
        layer = layers.get(key.rpartition(".")[0])
        actual = model.get_parameter(key) if layer is None else getattr(layer, key.rpartition(".")[2])
        assert_close_fp32(actual, expected)
        if key.endswith("weight") and layer is not None:
            assert layer.precision == ("int4" if layer.is_weight_only else precision)
            assert relative_error(actual, original.state_dict()[key]) < 0.12
    reference = type(original).from_config(original.config)
    reference.load_state_dict(meant)
    with torch.no_grad():
        for layer in layers.values():
            layer.set_compute_mode("w4a16")
        actual, expected = (m(**inputs(m), return_dict=False)[0] for m in (model, reference))
    assert_close_fp32(actual, expected)


def test_modes_and_dtypes(tmp_path):
    original, tensors, _ = case("flux", "nvfp4")
    model = load_nunchaku(files.write(tmp_path / "file.safetensors", tensors, original))
    layers = {key: module for key, module in model.named_modules() if isinstance(module, SVDQuantLayer)}
    adaln = {key for key in layers if ".norm" in key and key.endswith(".linear")}
    assert {key for key, layer in layers.items() if layer.is_weight_only} == adaln
    assert {layer.rank for key, layer in layers.items() if key in adaln} == {0}
    assert model.x_embedder.weight.dtype == layers["transformer_blocks.0.ff.net.2"].wtscale.dtype == torch.bfloat16
    # The parts of this layer have their own row scales, whose ratio 16 bits cannot hold.
    merged = layers["single_transformer_blocks.0.proj_out"]
    parts = [tensors[f"single_transformer_blocks.0.{part}.wtscale"] for part in ("out_proj", "mlp_fc2")]
    assert parts[0] != parts[1]
    assert merged.rank == 64
    assert merged.smooth_factor.dtype == torch.float32
    assert merged.proj_up.dtype == merged.bias.dtype == torch.bfloat16


def test_can_be_saved(tmp_path, sana):
    model = load_nunchaku(sana())
    assert isinstance(model.get_submodule("transformer_blocks.0.ff.conv_point"), SVDQuantConv2d)
    model.save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key


def test_bias_of_the_shift_is_near_the_original(tmp_path):
    original, tensors, _ = case("flux", "int4")
    model = load_nunchaku(files.write(tmp_path / "file.safetensors", tensors, original), dtype=torch.float32)
    for name in ("transformer_blocks.1.ff.net.2", "single_transformer_blocks.0.proj_out"):
        true = original.get_submodule(name).bias
        assert relative_error(model.get_submodule(name).bias, true) < 0.02
        stored = tensors[f"{name.split('.ff')[0].removesuffix('.proj_out')}.mlp_fc2.bias"]
        assert (stored.float().norm() - true.float().norm()).abs() > 0.05  # the shift is not too small to be seen


@pytest.mark.parametrize("key", ["proj_out.bias", "transformer_blocks.1.cross_attn.q_linear.lora_up"])
def test_missing_tensor(key, sana, tmp_path):
    model, tensors, _ = case("sana", "int4")
    rest = {name: tensor for name, tensor in tensors.items() if name != key}
    with pytest.raises(ValueError, match=f"must have '{key}'"):
        load_nunchaku(files.write(tmp_path / "file.safetensors", rest, model))


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("transformer_blocks.0.attn.pag_to_v.qweight", torch.zeros(1), "does not have, such as .*pag_to_v"),
        ("transformer_blocks.0.attn.qkv_proj.qweight", torch.zeros(640, 128).char(), "qweight' must have shape"),
        ("transformer_blocks.0.attn.qkv_proj.lora_up", torch.zeros(768, 16), "lora_up' must have shape"),
        ("transformer_blocks.0.attn.qkv_proj.bias", torch.ones(768), "has a bias for .*attn1.to_q"),
        ("proj_out.weight", torch.zeros(3, 160), "'proj_out.weight' must have shape"),
        ("proj_out.weight", torch.full((4, 160), 1e30), "'proj_out.weight' must be finite in torch.float16"),
    ],
)
def test_wrong_tensor(key, tensor, message, sana):
    with pytest.raises(ValueError, match=message):
        load_nunchaku(sana({key: tensor}), dtype=torch.float16)


def test_file_that_is_cut_short(sana):
    path = sana()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"file.safetensors must be a complete safetensors file"):
        load_nunchaku(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"config": ""}, "must have the model's `config`"),
        (
            {"config": '{"_class_name": "LuminaNextDiT2DModel"}'},
            "must be of one of the models .*got 'LuminaNext",
        ),
        ({"quantization_config": '{"method": "awq"}'}, "`method` .* must be \"svdquant\", got 'awq'"),
    ],
)
def test_other_files(metadata, message, sana):
    with pytest.raises(ValueError, match=message):
        load_nunchaku(sana(**metadata))


def test_arguments(sana, tmp_path):
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        load_nunchaku(sana(), dtype=torch.int8)
    with pytest.raises(ValueError, match="which does not exist"):
        load_nunchaku(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match=r"must be a folder with 'transformer_blocks.safetensors'"):
        load_nunchaku(tmp_path)


def test_model_class_of_the_caller(sana):
    class Own(diffusers.SanaTransformer2DModel):
        pass

    assert type(load_nunchaku(sana(), Own)) is Own


def test_missing_bias_that_nunchaku_never_adds(tmp_path):
    model, tensors, _ = case("sana", "int4")
    rest = {key: tensor for key, tensor in tensors.items() if not key.endswith(".attn.out_proj.bias")}
    loaded = load_nunchaku(files.write(tmp_path / "file.safetensors", rest, model))
    assert (loaded.get_submodule("transformer_blocks.0.attn1.to_out.0").bias == 0).all()


def snapshot(cache_dir, repo):
    """A repository in a cache of the Hub, as if it had been downloaded."""
    root = cache_dir / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    folder = root / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    return folder


def test_file_on_the_hub(tmp_path):
    model, tensors, meant = case("sana", "int4")
    files.write(snapshot(tmp_path, "someone/sana") / "svdq.safetensors", tensors, model)
    loaded = load_nunchaku("someone/sana/svdq.safetensors", cache_dir=tmp_path, dtype=torch.float32)
    assert_close_fp32(loaded.proj_out.weight, meant["proj_out.weight"])


def test_older_folder_on_the_hub(tmp_path):
    """Two files and the config beside them, without metadata."""
    model, tensors, meant = case("flux", "int4")
    folder = snapshot(tmp_path, "someone/flux")
    blocks = {key: tensor for key, tensor in tensors.items() if "transformer_blocks" in key}
    nothing = {"config": "", "model_class": "", "quantization_config": ""}
    files.write(folder / "transformer_blocks.safetensors", blocks, model, **nothing)
    rest = {key: tensor for key, tensor in tensors.items() if key not in blocks}
    files.write(folder / "unquantized_layers.safetensors", rest, model, **nothing)
    (folder / "config.json").write_text(json.dumps(dict(model.config) | {"_class_name": "FluxTransformer2DModel"}))
    loaded = load_nunchaku("someone/flux", cache_dir=tmp_path, dtype=torch.float32)
    name = "transformer_blocks.1.ff.net.2.weight"
    assert_close_fp32(loaded.get_submodule(name.removesuffix(".weight")).weight, meant[name])


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("name", MODELS)
def test_written_again(name, precision, tmp_path):
    """A file of another writer, read, written and read: a fixed point, and layers have the tensors of the file."""
    original, tensors, _ = case(name, precision)
    first = load_nunchaku(files.write(tmp_path / "file.safetensors", tensors, original))
    path = export_quantized(first, tmp_path / "again", "nunchaku")
    again, merged = load_nunchaku(path), "single_transformer_blocks.0.proj_out.smooth_factor"
    state = again.state_dict()
    for key, tensor in first.state_dict().items():
        # The ratio of the row scales of this layer's two parts is in its factors, which a file has in 16 bits.
        tensor = tensor.to(state[key].dtype) if key == merged else tensor
        assert torch.equal(as_bytes(state[key]), as_bytes(tensor)), key
    written = load_file(path)
    assert written.keys() == {key for key in tensors if not key.endswith(".smooth_orig")}
    for key, tensor in tensors.items():
        if key.endswith((".qweight", ".lora_down", ".lora_up", ".smooth", ".wtscale")) and ".mlp_fc2." not in key:
            assert written[key].dtype == tensor.dtype
            if tensor.dtype == torch.int32:  # the same weights with another zero point
                continue
            used = (tensor != files.FILL) & (written[key] != 0)  # where there is no padding
            assert torch.equal(written[key][used], tensor[used]), key
