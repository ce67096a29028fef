"""`from_pretrained` and `save_pretrained` of quantized diffusers models: options, errors, what is recorded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.base import DiffusersQuantizer
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import diffusers_sana
from diffusers_sana import SanaTransformer2DModel, SVDQuantConfig, set_compute_mode
from diffusers_sana.quantizers.svdquant.api import quantize
from diffusers_sana.quantizers.svdquant.layers.linear import quantized_layers
from tests.numerics import relative_error
from tests.quantizers import tiny_models
from tests.quantizers.tiny_models import output


CONFIG = SVDQuantConfig(rank=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.1.attn1.to_q"
EARLIER = Path(__file__).parents[2] / "fixtures" / "svdquant"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a model, the model and its inputs."""
    model, inputs = tiny_models.sana()
    folder = tmp_path_factory.mktemp("original")
    model.save_pretrained(folder)
    return folder, model, inputs


@pytest.fixture(scope="module")
def quantized(original, tmp_path_factory):
    """A folder with the quantized model, the model and its output."""
    folder, _, inputs = original
    model = SanaTransformer2DModel.from_pretrained(folder, quantization_config=CONFIG)
    folder = tmp_path_factory.mktemp("quantized")
    model.save_pretrained(folder)
    return folder, model, output(model, inputs)


def same_bits(one, other):
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.fixture
def copy(quantized, tmp_path):
    """The quantized folder, to be changed."""
    return shutil.copytree(quantized[0], tmp_path / "copy")


def test_what_the_library_asks(quantized):
    model = quantized[1]
    assert model.is_quantized
    assert model.quantization_method == "svdquant"
    quantizer = model.hf_quantizer
    assert isinstance(quantizer, DiffusersQuantizer)
    assert quantizer.is_serializable
    assert quantizer.is_trainable
    assert quantizer.is_compileable
    assert not model.training


def test_a_saved_model_lists_its_layers(quantized):
    recorded = json.loads((quantized[0] / "config.json").read_text())["quantization_config"]
    assert recorded["quant_method"] == "svdquant"
    assert recorded["modules"]["transformer_blocks.*.attn1.to_q"] == "w4a4"
    assert recorded["modules"]["time_embed.linear"] == "w4a16"
    assert len(recorded["modules"]) == 11
    assert CONFIG.modules is None  # the caller's own was not touched


def test_loading_info(original, quantized):
    for folder, arguments in ((original[0], {"quantization_config": CONFIG}), (quantized[0], {})):
        _, info = SanaTransformer2DModel.from_pretrained(folder, output_loading_info=True, **arguments)
        assert not any(info.values())


def test_shards_in_any_order(original, tmp_path):
    """With a bias in a later file than its weight, or in an earlier one."""
    _, model, inputs = original
    expected = output(SanaTransformer2DModel.from_pretrained(original[0], quantization_config=CONFIG), inputs)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    shards = sorted(set(index.values()))
    apart = [name for name in index if name.endswith(".bias") and index[name] != index[name[:-4] + "weight"]]
    assert apart
    for names in (shards, shards[::-1]):
        for number, name in enumerate(names):
            (tmp_path / name).rename(tmp_path / f"{number}.renamed")
        for number in range(len(names)):
            (tmp_path / f"{number}.renamed").rename(tmp_path / shards[number])
        moved = dict(zip(names, shards, strict=True))
        content = {"metadata": {}, "weight_map": {key: moved[value] for key, value in index.items()}}
        (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(content))
        index = content["weight_map"]
        loaded = SanaTransformer2DModel.from_pretrained(tmp_path, quantization_config=CONFIG)
        assert torch.equal(output(loaded, inputs), expected)


def test_saved_in_shards(original, quantized, tmp_path):
    quantized[1].save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(output(SanaTransformer2DModel.from_pretrained(tmp_path), original[2]), quantized[2])


def test_parallel_loading(original, quantized, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", "yes")
    for folder, name in ((original[0], "a"), (quantized[0], "b")):
        arguments = {"quantization_config": CONFIG} if name == "a" else {}
        loaded = SanaTransformer2DModel.from_pretrained(folder, **arguments)
        assert torch.equal(output(loaded, original[2]), quantized[2])


def test_single_file(tmp_path):
    model, inputs = tiny_models.flux()
    model.save_pretrained(tmp_path / "original")
    arguments = {"config": str(tmp_path / "original"), "local_files_only": True, "dtype": torch.float32}
    loaded = FluxTransformer2DModel.from_single_file(
        str(tmp_path / "original" / WEIGHTS), quantization_config=CONFIG, **arguments
    )
    assert relative_error(output(loaded, inputs), output(model, inputs)) < 0.1
    loaded.save_pretrained(tmp_path / "quantized")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "quantized")
    assert torch.equal(output(again, inputs), output(loaded, inputs))


def test_quantized_in_memory(original, tmp_path):
    model, inputs = tiny_models.sana()
    report = quantize(model, CONFIG, progress=False)
    assert len(report.layers) == 21
    with pytest.raises(ValueError, match="Casting a quantized model"):
        model.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = SanaTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(output(again, inputs), output(model, inputs))
    assert again.config.quantization_config == report.config


def test_a_folder_of_an_earlier_version():
    """Saved and run by commit c0b358a, with NVFP4 (w4a4) and int4 (w4a16) layers: every tensor loads bit for bit."""
    model = SanaTransformer2DModel.from_pretrained(EARLIER)
    loaded, stored = model.state_dict(), load_file(EARLIER / WEIGHTS)
    assert loaded.keys() == stored.keys()
    assert [name for name in stored if loaded[name].dtype != stored[name].dtype] == []
    assert [name for name in stored if loaded[name].nbytes and not same_bits(loaded[name], stored[name])] == []
    assert sorted({(layer.precision, layer.is_weight_only) for layer in quantized_layers(model)}) == [
        ("int4", True),
        ("nvfp4", False),
    ]
    inputs = load_file(EARLIER / "outputs.safetensors")
    expected = {mode: inputs.pop(mode) for mode in ("w4a16", "w4a4")}
    for mode, tolerance in (("w4a16", 1e-5), ("w4a4", 1e-2)):  # 4-bit activations may be rounded to another code
        set_compute_mode(model, mode)
        assert relative_error(output(model, inputs), expected[mode]) < tolerance


def test_fused_ranks_are_kept(original, quantized, tmp_path):
    model = SanaTransformer2DModel.from_pretrained(quantized[0])
    layer = model.get_submodule(LAYER)
    layer.add_to_weight(torch.randn(layer.out_features, 3) @ torch.randn(3, layer.in_features))
    changed = output(model, original[2])
    assert not torch.equal(changed, quantized[2])
    model.save_pretrained(tmp_path)
    again = SanaTransformer2DModel.from_pretrained(tmp_path)
    assert again.get_submodule(LAYER).rank == 7
    assert torch.equal(output(again, original[2]), changed)


def test_compute_mode(original, quantized, tmp_path):
    _, model, inputs = original
    exact = output(model, inputs)
    loaded = SanaTransformer2DModel.from_pretrained(quantized[0])
    errors = {}
    for mode in ("w4a16", "w4a8", "w4a4"):
        set_compute_mode(loaded, mode)
        errors[mode] = relative_error(output(loaded, inputs), exact)
        layers = {layer.mode_on(torch.device("cpu")) for layer in quantized_layers(loaded)}
        assert layers == {mode, "w4a16"}
    assert errors["w4a16"] <= 1.1 * errors["w4a8"]
    assert errors["w4a8"] < errors["w4a4"] < 0.1

    config = SVDQuantConfig(rank=4, compute_mode="w4a16")
    SanaTransformer2DModel.from_pretrained(original[0], quantization_config=config).save_pretrained(tmp_path)
    again = SanaTransformer2DModel.from_pretrained(tmp_path)
    assert {layer.compute_mode for layer in quantized_layers(again)} == {"w4a16"}
    with pytest.raises(ValueError, match="`compute_mode` must be one of"):
        set_compute_mode(again, "w2a2")
    with pytest.raises(ValueError, match="has no layers quantized by SVDQuant"):
        set_compute_mode(model, "w4a16")


def test_inference_mode(original, quantized):
    """Its tensors count no versions, by which the CPU's 8-bit copies are told from outdated ones."""
    _, _, inputs = original
    with torch.inference_mode():
        model = SanaTransformer2DModel.from_pretrained(quantized[0])
        assert torch.equal(output(model, inputs), quantized[2])
    assert torch.equal(output(model, inputs), quantized[2])
    weights = model.state_dict()
    codes = {name: tensor.flip(0) for name, tensor in weights.items() if name.endswith("qweight")}
    with torch.inference_mode():
        model.load_state_dict(weights | codes)  # in place
        changed = output(model, inputs)
    assert relative_error(changed, quantized[2]) > 0.1
    set_compute_mode(model, "w4a8")  # without what was prepared
    assert torch.equal(output(model, inputs), changed)


def test_older_folders(original, quantized, copy):
    """Their configs have neither layout nor dtype."""
    config = json.loads((copy / "config.json").read_text())
    for name in ("layout", "dtype"):
        del config["quantization_config"][name]
    (copy / "config.json").write_text(json.dumps(config))
    loaded = SanaTransformer2DModel.from_pretrained(copy)
    assert torch.equal(output(loaded, original[2]), quantized[2])
    assert loaded.config.quantization_config == quantized[1].config.quantization_config


def test_dtype_is_kept(original, tmp_path):
    model = SanaTransformer2DModel.from_pretrained(original[0], dtype=torch.bfloat16)
    diffusers_sana.quantize(model, CONFIG, folder=tmp_path / "in memory", progress=False)
    on_the_way = SanaTransformer2DModel.from_pretrained(original[0], quantization_config=CONFIG, dtype=torch.bfloat16)
    on_the_way.save_pretrained(tmp_path / "on the way")
    for folder in (tmp_path / "in memory", tmp_path / "on the way"):
        loaded = SanaTransformer2DModel.from_pretrained(folder)
        assert loaded.dtype == loaded.get_submodule(LAYER).proj_up.dtype == torch.bfloat16
        full = SanaTransformer2DModel.from_pretrained(folder, dtype=torch.float32)
        assert full.dtype == full.get_submodule(LAYER).proj_up.dtype == torch.float32


def test_adapters_beside_the_layers_are_not_saved(tmp_path):
    """Of a model that is not ours, and so has diffusers' own `save_pretrained`."""
    model, inputs = tiny_models.flux()
    quantize(model, CONFIG, progress=False)
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "x_embedder"]))
    with pytest.raises(ValueError, match="cannot be saved while adapters are beside its layers"):
        model.save_pretrained(tmp_path)
    model.fuse_lora()
    with pytest.raises(ValueError, match="cannot be saved while adapters are beside its layers"):
        model.save_pretrained(tmp_path)
    model.unload_lora()
    model.save_pretrained(tmp_path)
    assert torch.equal(output(FluxTransformer2DModel.from_pretrained(tmp_path), inputs), output(model, inputs))


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"quantization_config": SVDQuantConfig(rank=17)}, "`rank` must be at most 16"),
            ({"quantization_config": SVDQuantConfig(rank=4, modules={"nothing": "w4a4"})}, "'nothing' matches none"),
            ({"quantization_config": SVDQuantConfig(rank=4, gptq=True)}, "`gptq` must be False in `from_pretrained`"),
            ({"quantization_config": CONFIG, "dtype": torch.float8_e4m3fn}, "`dtype` must be one of"),
            ({"quantization_config": CONFIG, "device_map": {"": "disk"}}, "`device_map` must not put layers on disk"),
        ],
    )
    def test_arguments(self, original, arguments, message):
        with pytest.raises(ValueError, match=message):
            SanaTransformer2DModel.from_pretrained(original[0], **arguments)

    def test_twice(self, quantized):
        with pytest.warns(UserWarning, match="`quantization_config` from the model will be used"):
            again = SanaTransformer2DModel.from_pretrained(quantized[0], quantization_config=SVDQuantConfig(rank=2))
        assert {layer.rank for layer in quantized_layers(again)} == {4}
        with pytest.raises(ValueError, match="is already quantized by SVDQuant"):
            quantize(again, CONFIG)
        with pytest.raises(ValueError, match="is already quantized by SVDQuant"):
            diffusers_sana.quantize(again)

    def test_weights_that_are_not_finite(self, original, tmp_path):
        shutil.copytree(original[0], tmp_path, dirs_exist_ok=True)
        tensors = load_file(tmp_path / WEIGHTS)
        tensors[f"{LAYER}.weight"][0, 0] = torch.nan
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"the weight of '{LAYER}' must be finite"):
            SanaTransformer2DModel.from_pretrained(tmp_path, quantization_config=CONFIG)

    def test_original_without_a_weight(self, original, tmp_path):
        shutil.copytree(original[0], tmp_path, dirs_exist_ok=True)
        tensors = load_file(tmp_path / WEIGHTS)
        del tensors[f"{LAYER}.weight"]
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"lacks 1 tensors .*{LAYER}.weight"):
            SanaTransformer2DModel.from_pretrained(tmp_path, quantization_config=CONFIG)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            (f"{LAYER}.qweight", None, f"lacks 1 tensors .*{LAYER}.qweight"),
            ("transformer_blocks.0.attn1.to_out.0.bias", None, "lacks 1 tensors"),
            ("proj_out.weight", None, "lacks 1 tensors .*proj_out.weight"),
            (
                f"{LAYER}.qweight",
                lambda x: x[:-1],
                r"qweight' must be torch.uint8 of shape \[16, 32\], got .*\[15, 32\]",
            ),
            (f"{LAYER}.qweight", lambda x: x.float(), "qweight' must be torch.uint8 .*, got torch.float32"),
            (f"{LAYER}.wscales", lambda x: x.to(torch.float8_e4m3fn), "wscales' must be torch.float32"),
            (f"{LAYER}.smooth_factor", lambda x: x[None], "smooth_factor' must be"),
            (f"{LAYER}.proj_up", lambda x: x[:-1], r"proj_up' must be torch.float32 of shape \[16, 'rank'\]"),
            (f"{LAYER}.proj_up", lambda x: x[:, :-1], rf"`proj_down` and `proj_up` of '{LAYER}' must be"),
        ],
        ids=lambda value: value.rpartition(".")[2] if isinstance(value, str) and " " not in value else "",
    )
    def test_damaged_checkpoint(self, copy, name, change, message):
        tensors = load_file(copy / WEIGHTS)
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor).contiguous()
        save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            SanaTransformer2DModel.from_pretrained(copy)

    def test_config_of_another_precision(self, copy):
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"]["precision"] = "nvfp4"
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"wscales' must be torch.float8_e4m3fn|lacks .*wtscale"):
            SanaTransformer2DModel.from_pretrained(copy)

    def test_folder_of_another_runtime(self, copy):
        """As vLLM-Omni writes it, whose layout has our name; and of a layout that is yet to come."""
        config = json.loads((copy / "config.json").read_text())
        theirs = {"quant_method": "svdquant", "rank": 4, "precision": "nvfp4", "act_unsigned": False}
        for described, message in (
            (theirs, r"by another runtime .* such as vLLM-Omni"),
            (config["quantization_config"] | {"layout": "diffusers_sana/9"}, "Upgrade diffusers_sana"),
        ):
            (copy / "config.json").write_text(json.dumps(config | {"quantization_config": described}))
            with pytest.raises(ValueError, match=message):
                SanaTransformer2DModel.from_pretrained(copy)

    def test_config_of_another_model(self, copy):
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"]["modules"]["transformer_blocks.*.attn3.to_q"] = "w4a4"
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"'transformer_blocks.\*.attn3.to_q' matches none"):
            SanaTransformer2DModel.from_pretrained(copy)


def test_layers_stay_linear_layers(quantized):
    layer = quantized[1].get_submodule(LAYER)
    assert isinstance(layer, nn.Linear)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
