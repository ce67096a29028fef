"""Whole files: which family they are of, files of other writers, and what is refused by name."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.loaders.nunchaku.layers import LITE_NAMES
from diffusers_sana.loaders.nunchaku.packing import pack_vector
from diffusers_sana.loaders.quantized.checkpoint import FAMILIES, open_checkpoint, sniff
from diffusers_sana.loaders.quantized.hub import export_quantized, load_quantized
from diffusers_sana.loaders.quantized.rows import pairs
from tests.cli.commands import run
from tests.loaders.nunchaku import nunchaku_files as files
from tests.loaders.quantized import tiny_models as tiny
from tests.numerics import assert_close_fp32, relative_error


WEIGHTS = "diffusion_pytorch_model.safetensors"


def written(to, precision, tmp_path, family="qwen", **options):
    model = tiny.quantized(family, precision, 16)
    for layer in tiny.layers(model).values():
        layer.input_scale = 1.0
    return export_quantized(model, tmp_path / to, to, **options)


@pytest.mark.parametrize(
    ("to", "precision", "family", "without_config"),
    [
        ("diffusers-sana", "int4", "diffusers-sana", "diffusers-sana"),
        ("diffusers-sana", "int8", "diffusers-sana", "diffusers-sana"),
        ("cache-dit", "int4", "cache-dit", "nunchaku-lite"),
        ("vllm-omni", "nvfp4", "vllm-omni", "vllm-omni"),
        ("modelopt", "nvfp4", "modelopt", "modelopt"),
        ("comfy", "int4", "comfy", "comfy"),
        ("comfy-convrot", "int4", "comfy", "comfy"),
        ("nunchaku", "int4", "nunchaku", "nunchaku"),
    ],
)
def test_sniff(to, precision, family, without_config, tmp_path):
    """By tensors, where configs and headers are lost."""
    path = written(to, precision, tmp_path, **{"requantize": True} if to == "nunchaku" else {})
    found = open_checkpoint(path)
    assert found.family == family
    assert sniff({}, {}, found.tensors) == without_config
    assert family in FAMILIES


def test_sniff_of_what_is_read_only():
    def tensors(**named):
        return {f"x.{name}": tensor for name, tensor in named.items()}

    codes = torch.zeros(128, 64, dtype=torch.int8)
    assert sniff({}, {}, tensors(qweight=codes, wscales=torch.zeros(4, 128, dtype=torch.uint8))) == "auto-round"
    lite = tensors(
        qweight=codes, wscales=torch.zeros(2, 128), proj_down=torch.zeros(128, 16), smooth_factor=torch.ones(128)
    )
    assert sniff({"quant_method": "nunchaku_lite"}, {}, lite) == sniff({}, {}, lite) == "nunchaku-lite"
    assert sniff({"quant_method": "svdquant"}, {}, lite) == "vllm-omni"
    assert sniff({"quant_method": "sdnq"}, {}, tensors(weight=codes, scale=torch.ones(1))) == "sdnq"
    assert sniff({}, {}, tensors(weight=codes, scale=torch.ones(1), svd_up=torch.ones(1))) == "sdnq"
    assert sniff({}, {}, tensors(weight=codes)) is None


def test_no_quantized_checkpoint(tmp_path):
    tiny.flux().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a quantized checkpoint of one of this package, Nunchaku, "):
        load_quantized(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must be a folder with safetensors files, but has none"):
        load_quantized(tmp_path / "empty")


def v2_file(model, precision):
    """A file of Nunchaku's Python modules by the formulas of the format, and what it stands for."""
    file, name = files._File(model, precision), type(model).__name__
    if name == "QwenImageTransformer2DModel":
        block = "transformer_blocks.0"
        file.plain(f"{block}.attn.to_qkv", [f"{block}.attn.to_{x}" for x in "qkv"])
        file.plain(f"{block}.attn.add_qkv_proj", [f"{block}.attn.add_{x}_proj" for x in "qkv"])
        plain = ["attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.0.proj"]
        for part in plain:
            file.plain(f"{block}.{part}", [f"{block}.{part}"])
        for part in ("img_mlp.net.2", "txt_mlp.net.2"):
            file.plain(f"{block}.{part}", [f"{block}.{part}"], shifted=precision == "int4")
        for part in ("img_mod.1", "txt_mod.1"):
            files._adaln(file, f"{block}.{part}", 6)
    elif name == "ZImageTransformer2DModel":
        block = "layers.0"
        file.plain(f"{block}.attention.to_qkv", [f"{block}.attention.to_{x}" for x in "qkv"])
        file.plain(f"{block}.attention.to_out.0", [f"{block}.attention.to_out.0"])
        file.plain(f"{block}.feed_forward.net.0.proj", [f"{block}.feed_forward.w{x}" for x in (3, 1)])
        file.plain(f"{block}.feed_forward.net.2", [f"{block}.feed_forward.w2"])
        for block in ("noise_refiner.0", "context_refiner.0"):  # in 16 bits, with names of their own
            weights = [file.take(f"{block}.feed_forward.w{x}.weight") for x in (3, 1)]
            file.tensors[f"{block}.feed_forward.net.0.proj.weight"] = torch.cat(weights)
            file.tensors[f"{block}.feed_forward.net.2.weight"] = file.take(f"{block}.feed_forward.w2.weight")
            file.meant |= {
                f"{block}.feed_forward.w{x}.weight": file.original[f"{block}.feed_forward.w{x}.weight"]
                for x in (1, 2, 3)
            }
    else:
        for block in sorted({key.split(".attn1.")[0] for key in file.original if ".attn1." in key}):
            file.plain(f"{block}.attn1.to_qkv", [f"{block}.attn1.to_{x}" for x in "qkv"])
            for part in ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
                file.plain(f"{block}.{part}", [f"{block}.{part}"])
    tensors, meant = file.finish()
    if name == "UNet2DConditionModel":  # suffixes of the C++ engine
        return tensors, meant
    for key in list(tensors):
        name, _, part = key.rpartition(".")
        if part in LITE_NAMES:
            tensors[f"{name}.{LITE_NAMES[part]}"] = tensors.pop(key)
    return {key.replace(".smooth_orig", ".smooth_factor_orig"): value for key, value in tensors.items()}, meant


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("family", ["qwen", "z_image", "sdxl"])
def test_nunchaku_v2(family, precision, tmp_path):
    """Every weight and bias, from a file that is written by the formulas of the format."""
    torch.manual_seed(0)
    model = tiny.FAMILIES[family]()
    tensors, meant = v2_file(model, precision)
    path = files.write(tmp_path / "file.safetensors", tensors, model)
    loaded = load_quantized(path, dtype=torch.float32)
    layers = tiny.layers(loaded)
    assert len(layers) == {"qwen": 14, "z_image": 7, "sdxl": 32}[family]
    for key, expected in meant.items():
        layer = layers.get(key.rpartition(".")[0])
        actual = loaded.get_parameter(key) if layer is None else getattr(layer, key.rpartition(".")[2])
        assert_close_fp32(actual, expected)


@pytest.fixture
def vllm(tmp_path):
    """A folder whose vectors can be made those of the early converter."""
    base = tmp_path / "base"
    tiny.flux().save_pretrained(base)
    path = written("vllm-omni", "nvfp4", tmp_path, "flux")

    def change(conversion, tiled):
        tensors = load_file(path / WEIGHTS)
        for key, tensor in tensors.items():
            if (tiled and key.endswith((".smooth_factor", ".wcscales"))) or (
                tiled and key.endswith(".bias") and key.replace(".bias", ".qweight") in tensors
            ):
                tensors[key] = pack_vector(tensor)
        header = {} if conversion is None else {"conversion": json.dumps(conversion)}
        save_file(tensors, path / WEIGHTS, {"format": "pt", **header})
        return path, base

    return change


@pytest.mark.parametrize("conversion", [None, {"tool": "x"}, {"tool": "x", "model_family": "z_image"}])
def test_vectors_in_tile_order_of_an_early_converter(conversion, vllm, caplog):
    """The base model's weights show the order; without them the file is refused by name, never loaded wrong."""
    model = tiny.quantized("flux", "nvfp4")
    for tiled in (True, False):
        path, base = vllm(conversion, tiled)
        with pytest.raises(
            ValueError, match=r"may have vectors such as .*Nunchaku's tile order.*Pass the 16-bit model"
        ):
            load_quantized(path)
        loaded = load_quantized(path, base=base)
        for name, layer in tiny.layers(loaded).items():
            assert_close_fp32(layer.dequantize(torch.float32), tiny.layers(model)[name].dequantize(torch.float32))
        assert ("has vectors in Nunchaku's tile order, which is undone" in caplog.text) == tiled
        caplog.clear()
        if tiled:
            written("vllm-omni", "nvfp4", path.parent, "flux")  # in natural order again


def test_vllm_omni_of_another_base(vllm, tmp_path):
    path, _ = vllm(None, True)
    other = tiny.flux()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is not a quantized form of the weight of `base`: the relative error is 1"):
        load_quantized(path, base=tmp_path / "other")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["act_unsigned"] = True
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"`act_unsigned` of .* must be False"):
        load_quantized(path)


def test_cache_dit_files(tmp_path):
    path = written("cache-dit", "int4", tmp_path)
    with pytest.raises(ValueError, match="`base` must be the 16-bit model"):
        load_quantized(path)
    tiny.qwen().save_pretrained(tmp_path / "base")
    key = "cache_dit_svdq_ptq"
    header = json.loads(open_checkpoint(path).metadata[key])
    for change, message in (
        ({"version": 1}, "`version` of the cache-dit file .* must be 2, got 1"),
        ({"quantized_layer_names": ["gone"]}, "must have 'gone.qweight', which its header lists"),
    ):
        save_file(load_file(path), tmp_path / "changed.safetensors", {key: json.dumps(header | change)})
        with pytest.raises(ValueError, match=message):
            load_quantized(tmp_path / "changed.safetensors", base=tmp_path / "base")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfy_files(prefix, tmp_path):
    """With a prefix, with a header in place of markers, with other parts in the file; and an unknown format."""
    path = written("comfy", "int4", tmp_path)
    tiny.qwen().save_pretrained(tmp_path / "base")
    expected = load_quantized(path, base=tmp_path / "base")
    tensors = {f"{prefix}{key}": value for key, value in load_file(path).items()}
    layers = json.loads(open_checkpoint(path).metadata["_quantization_metadata"])["layers"]
    tensors = {key: value for key, value in tensors.items() if not key.endswith(".comfy_quant")}
    if prefix:
        tensors["vae.weight"] = torch.ones(1)
    header = {"layers": {f"{prefix}{name}": conf for name, conf in layers.items()}}
    other = tmp_path / "other.safetensors"
    save_file(tensors, other, {"_quantization_metadata": json.dumps(header)})
    tiny.assert_equal_state(load_quantized(other, base=tmp_path / "base"), expected)
    name = next(iter(header["layers"]))
    header["layers"][name] = {"format": "mxfp8"}
    save_file(tensors, other, {"_quantization_metadata": json.dumps(header)})
    with pytest.raises(
        ValueError, match=r"`comfy_quant.format` of 'transformer_blocks.0.* must be one of .*got 'mxfp8'"
    ):
        load_quantized(other, base=tmp_path / "base")


def test_comfy_float8_e5m2(tmp_path, caplog):
    """Layers in 16 bits, with a warning, beside those in 4 bits."""
    path = written("comfy", "int4", tmp_path)
    tiny.qwen().save_pretrained(tmp_path / "base")
    metadata = open_checkpoint(path).metadata
    header, tensors = json.loads(metadata["_quantization_metadata"]), load_file(path)
    name = "transformer_blocks.0.attn.to_q"
    header["layers"][name] = {"format": "float8_e5m2"}
    rows, columns = tensors[f"{name}.weight_proj_up"].shape[0], tensors[f"{name}.weight_proj_down"].shape[0]
    bias = tensors[f"{name}.bias"]
    tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
    weight, scales = torch.randn(rows, columns).to(torch.float8_e5m2), torch.rand(rows)
    tensors |= {f"{name}.weight": weight, f"{name}.weight_scale": scales, f"{name}.bias": bias}
    save_file(tensors, path, metadata | {"_quantization_metadata": json.dumps(header)})
    loaded = load_quantized(path, base=tmp_path / "base")
    assert torch.equal(loaded.get_submodule(name).weight, (weight.float() * scales[:, None]).to(torch.bfloat16))
    assert loaded.transformer_blocks[0].attn.to_k.precision == "int4"
    assert f"1 layers of {path}, such as '{name}', are in float8_e5m2" in caplog.text


def test_comfy_tiles(tmp_path):
    tiny.flux().save_pretrained(tmp_path / "base")
    model = tiny.quantized("flux")
    path = export_quantized(model, tmp_path / "comfy", "comfy", tiled=True, requantize=True)
    assert load_file(path)["double_blocks.0.img_attn.qkv.weight"].shape == (3, 2, 32, 128)
    loaded = load_quantized(path, base=tmp_path / "base")
    for name in ("transformer_blocks.0.attn.to_k", "transformer_blocks.0.ff.net.2"):
        assert_close_fp32(loaded.get_submodule(name).weight.float(), model.get_submodule(name).weight.float())


def test_sdnq_folder(tmp_path):
    model = tiny.flux()
    tensors = dict(model.state_dict())
    name = "transformer_blocks.0.attn.to_q"
    weight = tensors.pop(f"{name}.weight").float()
    scale = weight.unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True) / 7
    codes = (weight.unflatten(1, (-1, 64)) / scale).round().flatten(1).to(torch.int16) + 8
    tensors |= {f"{name}.weight": pairs(codes.to(torch.uint8)).flatten(), f"{name}.scale": scale}
    config = json.loads(model.to_json_string())

    def save(**quantization):
        model.save_pretrained(tmp_path)
        save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
        settings = {"quant_method": "sdnq", "weights_dtype": "int4", "use_svd": True, **quantization}
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        return load_quantized(tmp_path, dtype=torch.float32)

    assert relative_error(save().get_submodule(name).dequantize(torch.float32), weight) < 0.12
    for change, message in (
        ({"use_hadamard": True}, "has `use_hadamard`, rotated weights"),
        ({"weights_dtype": "int8"}, "must have int4 or uint4 layers throughout to be read, got 'int8'"),
        ({"modules_dtype_dict": {"int8": ["x"]}}, "got 'int4' and `modules_dtype_dict`"),
    ):
        with pytest.raises(ValueError, match=message):
            save(**change)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled pipeline, quantized, as a folder."""
    place = tmp_path_factory.mktemp("bundled")
    for precision in ("int4", "nvfp4"):
        pipe = diffusers.SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.bfloat16)
        tiny.quantize(
            pipe, tiny.SVDQuantConfig(precision=precision, rank=8, smoothing="none", refinements=0), progress=False
        )
        pipe.save_pretrained(place / precision)
    return place


@pytest.mark.parametrize("to", ["vllm-omni", "cache-dit", "comfy", "comfy-convrot", "modelopt", "diffusers-sana"])
def test_bundled_checkpoint_by_the_command_line(to, bundled, tmp_path):
    """From a pipeline to each format, and from there to our own again."""
    precision = "nvfp4" if to in ("vllm-omni", "modelopt", "diffusers-sana") else "int4"
    options = []
    if to == "modelopt":
        (tmp_path / "prompts.txt").write_text("an apple\n")
        options = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "1"]
    ended = run("convert", str(bundled / precision), "-o", str(tmp_path / "out"), "--to", to, *options)
    assert ended.code == 0, ended.error
    path = ended.out.strip()
    is_pipeline = to in ("vllm-omni", "modelopt", "diffusers-sana")
    assert (tmp_path / "out" / "model_index.json").exists() == is_pipeline
    ended = run("convert", path, "-o", str(tmp_path / "back"), "--to", "diffusers-sana", "--base", SANA_EMOJI)
    if to == "comfy-convrot":
        assert ended.code == 0, ended.error
        return
    assert ended.code == 0, ended.error
    folder = tmp_path / "back" / "transformer" if is_pipeline else tmp_path / "back"
    again = diffusers.SanaTransformer2DModel.from_pretrained(folder)
    first = diffusers.SanaTransformer2DModel.from_pretrained(bundled / precision / "transformer")
    layers = tiny.layers(again)
    assert layers
    for name, layer in layers.items():
        expected = tiny.layers(first)[name].dequantize(torch.float32)
        assert relative_error(layer.dequantize(torch.float32), expected) < 0.01


def test_bundled_checkpoint_where_it_does_not_fit(bundled, tmp_path):
    for to, message in (
        ("nunchaku", "no `qk_norm`, got 32 and 'rms_norm_across_heads'"),
        ("nunchaku-lite", "linear layers only"),
        ("modelopt", "it needs a static scale of its input. Run the pipeline"),
    ):
        precision = "nvfp4" if to == "modelopt" else "int4"
        ended = run("convert", str(bundled / precision), "-o", str(tmp_path / "out"), "--to", to)
        assert ended.code != 0
        assert message in ended.error
        assert not (tmp_path / "out").exists()
