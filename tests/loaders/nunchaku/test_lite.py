"""Nunchaku-Lite: what diffusers' own loader expects is what is written, and reading it back loses no bit."""

import json
import sys
from importlib import import_module
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import NunchakuLiteQuantizationConfig
from safetensors.torch import load_file

from diffusers_sana.loaders.nunchaku.lite import WEIGHTS, export_nunchaku_lite, load_nunchaku_lite
from diffusers_sana.loaders.nunchaku.load import load_nunchaku
from diffusers_sana.quantizers.svdquant.api import quantize
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.quantizers.svdquant.layers.linear import SVDQuantLayer
from tests.loaders.nunchaku import nunchaku_files as files
from tests.numerics import relative_error


DTYPE = torch.bfloat16


def quantized(precision="int4", model=None, dtype=DTYPE, **options):
    model = (model or files.flux(2, 64, num_layers=1)).to(dtype)
    config = SVDQuantConfig(precision=precision, **{"rank": 20, "smoothing": "none", **options})
    quantize(model, config, progress=False)
    return model


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def model(request):
    return quantized(request.param)


@pytest.fixture
def host(monkeypatch):
    """diffusers' loader of the format, which on import asks for a package of GPU kernels that is not needed here."""
    kernels = SimpleNamespace(get_kernel=lambda *args, **kwargs: SimpleNamespace(ops=None))
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr("diffusers.utils.is_kernels_available", lambda: True)
    monkeypatch.setattr("diffusers.utils.is_kernels_version", lambda *args: True)
    monkeypatch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    name = "diffusers.quantizers.nunchaku.utils"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield import_module(name)
    del sys.modules[name]


def check_host_accepts(folder, utils):
    """Names, shapes and dtypes are those of the modules that diffusers puts into the model."""
    config = json.loads((folder / "config.json").read_text())
    quantization = NunchakuLiteQuantizationConfig(**config.pop("quantization_config"))
    with init_empty_weights():
        theirs = getattr(diffusers, config["_class_name"]).from_config(config).to(quantization.compute_dtype)
    utils.replace_with_nunchaku_linear(theirs, quantization.to_dict(), quantization.compute_dtype)
    written = load_file(folder / f"{WEIGHTS}.safetensors")
    utils.check_strict_state_dict_match(theirs, written)
    for name, tensor in theirs.state_dict().items():
        assert (written[name].shape, written[name].dtype) == (tensor.shape, tensor.dtype), name
    return quantization


def check_same_weights(again, model):
    """Bit for bit, whether a layer is in 4 bits or written out."""
    for name, module in model.named_modules():
        if isinstance(module, SVDQuantLayer):
            assert torch.equal(again.get_submodule(name).weight, module.weight), name
            bias = again.get_submodule(name).bias
            assert bias is module.bias is None or torch.equal(bias, module.bias), name
    parameters = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), SVDQuantLayer):
            assert torch.equal(parameters[name], parameter), name


def test_round_trip(model, host, tmp_path):
    export_nunchaku_lite(model, tmp_path)
    config = check_host_accepts(tmp_path, host)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SVDQuantLayer)}
    assert config.svdq_w4a4["targets"] == [name for name, layer in layers.items() if not layer.is_weight_only]
    assert config.svdq_w4a4["rank"] == 32  # 20, and zeros
    assert config.awq_w4a16 is None
    again = load_nunchaku_lite(tmp_path)
    check_same_weights(again, model)
    assert type(again.get_submodule("transformer_blocks.0.norm1.linear")) is torch.nn.Linear
    assert again.get_submodule("transformer_blocks.0.attn.to_q").precision == config.svdq_w4a4["precision"]


def test_options_for_the_hub_of_a_folder_that_is_here(model, tmp_path, caplog):
    export_nunchaku_lite(model, tmp_path)
    with pytest.raises(TypeError, match="`torch_type` is neither an argument here nor one of"):
        load_nunchaku_lite(tmp_path, torch_type=torch.bfloat16)
    with caplog.at_level("WARNING", logger="diffusers_sana.checkpoint_files"):
        load_nunchaku_lite(tmp_path, token=None, local_files_only=True)
        assert not caplog.records
        load_nunchaku_lite(tmp_path, revision="main")
    assert f"`revision` 'main' has no effect: {tmp_path} is not on the Hub." in caplog.text


def test_adaln_in_4_bits(model, host, tmp_path):
    export_nunchaku_lite(model, tmp_path, requantize_weight_only=True)
    adaln = [f"transformer_blocks.0.{name}.linear" for name in ("norm1", "norm1_context")]
    adaln.append("single_transformer_blocks.0.norm.linear")
    assert check_host_accepts(tmp_path, host).awq_w4a16["targets"] == adaln
    again = load_nunchaku_lite(tmp_path)
    for name in adaln:
        layer = again.get_submodule(name)
        assert layer.is_weight_only
        assert relative_error(layer.weight, model.get_submodule(name).weight) < 0.13


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_from_nunchaku_and_back(precision, host, tmp_path):
    """Nunchaku's adaLN layers have no branch, so that they stay in 4 bits, and layers differ in rank."""
    original = files.flux(2, 64)
    path = files.write(tmp_path / "file.safetensors", files.flux_file(original, precision)[0], original)
    model = load_nunchaku(path)
    if precision == "nvfp4":  # the factors of this layer need fp32, and Lite has none; see the documentation
        layer = model.get_submodule("single_transformer_blocks.0.proj_out")
        layer.smooth_factor.data = layer.smooth_factor.data.to(DTYPE)
    export_nunchaku_lite(model, tmp_path / "lite")
    config = check_host_accepts(tmp_path / "lite", host)
    assert len(config.awq_w4a16["targets"]) == 5
    assert config.svdq_w4a4["rank"] == 64
    check_same_weights(load_nunchaku_lite(tmp_path / "lite"), model)


def test_several_files_in_a_subfolder_on_the_hub(tmp_path):
    model = quantized()
    folder = tmp_path / "models--someone--flux"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    transformer = folder / "snapshots" / ("0" * 40) / "transformer"
    export_nunchaku_lite(model, transformer, max_shard_size="500KB")
    assert len(list(transformer.glob("*.safetensors"))) > 1
    again = load_nunchaku_lite("someone/flux", subfolder="transformer", cache_dir=tmp_path, dtype=torch.float16)
    assert again.get_submodule("transformer_blocks.0.attn.to_q").proj_up.dtype == torch.float16
    check_same_weights(load_nunchaku_lite(transformer), model)


def test_sana_without_its_convolutions(tmp_path):
    model = diffusers.SanaTransformer2DModel(num_layers=1, num_attention_heads=4, cross_attention_dim=128,
                                             num_cross_attention_heads=4, cross_attention_head_dim=32)  # fmt: skip
    model = quantized(model=model, modules_to_not_convert=["ff", "time_embed", "to_k", "to_v"])
    export_nunchaku_lite(model, tmp_path)
    check_same_weights(load_nunchaku_lite(tmp_path), model)


def with_adapters():
    model = quantized()
    model.peft_config = {"default": None}
    return model


def mixed():
    model = quantized()
    other = quantized("nvfp4")
    model.transformer_blocks[0].attn.to_q = other.transformer_blocks[0].attn.to_q
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: files.flux(2, 64, 1), "has none"),
        (lambda: quantized(model=files.sana()), r"linear layers only, .*conv_inverted"),
        (
            lambda: quantized(model=files.flux(3, 64, 1)),
            "multiples of 128, but 'transformer_blocks.0.attn.to_q' is 192",
        ),
        (lambda: quantized(dtype=torch.float32), r"one dtype of .* got \['torch.float32'\]"),
        (mixed, r"one format of .* got \['int4', 'nvfp4'\]"),
        (with_adapters, "must have no adapters"),
        (lambda: quantized(modules={"transformer_blocks.0.norm1.linear": "w4a16"}), "no layer of the model can be"),
    ],
)
def test_what_cannot_be_exported(build, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_nunchaku_lite(build(), tmp_path / "lite")
    assert not (tmp_path / "lite").exists()


def test_what_cannot_be_loaded(tmp_path):
    model = quantized(modules={"*.to_out.0": "w4a4"})
    export_nunchaku_lite(model, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())

    def refused(message, quantization=(), **changes):
        changed = {**config["quantization_config"], **dict(quantization)}
        path.write_text(json.dumps({**config, "quantization_config": changed, **changes}))
        with pytest.raises(ValueError, match=message):
            load_nunchaku_lite(tmp_path)

    refused("must be \"nunchaku_lite\", got 'gguf'", {"quant_method": "gguf"})
    refused("must list at least one layer", {"svdq_w4a4": None})
    refused(r"has no layer 'no.layer'", {"svdq_w4a4": {"targets": ["no.layer"]}})
    refused("must have 'x_embedder.qweight'", {"svdq_w4a4": {"targets": ["x_embedder"]}})
    refused("names 'NoModel', which diffusers does not have", _class_name="NoModel")
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        load_nunchaku_lite(tmp_path, dtype=torch.int8)
    path.unlink()
    with pytest.raises(ValueError, match=r"must be a folder with config.json"):
        load_nunchaku_lite(tmp_path)
