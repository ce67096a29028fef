"""`from_pretrained` leaves no weight without a value, and an error names the file that is wrong."""

import json
import logging

import diffusers
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import diffusers_sana
from tests import tiny
from tests.pipelines.controlnet_cases import controlnet


WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS = {
    "SanaTransformer2DModel": lambda: tiny.transformer(diffusers_sana),
    "AutoencoderDC": lambda: tiny.vae(diffusers_sana),
    "SanaControlNetModel": controlnet,
}
# One of each model's tensors, and one of a block behind its last.
TENSORS = {
    "SanaTransformer2DModel": ("proj_out.weight", "transformer_blocks.2.ff.conv_inverted.conv.weight"),
    "AutoencoderDC": ("encoder.conv_in.weight", "decoder.up_blocks.0.9.conv1.weight"),
    "SanaControlNetModel": ("transformer_blocks.0.attn1.to_q.weight", "controlnet_blocks.1.weight"),
}
WAYS = [{}, {"low_cpu_mem_usage": False}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}]


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    MODELS[name]().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(name, folder, **kwargs):
    return getattr(diffusers_sana, name).from_pretrained(folder, **kwargs)


def edit(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize("way", WAYS, ids=str)
class TestTensors:
    def test_all_there(self, name, folder, way):
        model, info = load(name, folder, output_loading_info=True, **way)
        assert not any(info.values())
        wanted = load_file(folder / WEIGHTS)
        assert all(
            torch.equal(value.float(), wanted[key].to(value.dtype).float())
            for key, value in model.state_dict().items()
        )

    def test_missing(self, name, folder, way):
        edit(folder, lambda weights: weights.pop(TENSORS[name][0]))
        with pytest.raises(ValueError, match=rf"{WEIGHTS} lacks 1 tensors of the model, such as '{TENSORS[name][0]}'"):
            load(name, folder, **way)

    def test_renamed(self, name, folder, way):
        edit(folder, lambda weights: weights.update({"other.weight": weights.pop(TENSORS[name][0])}))
        with pytest.raises(ValueError, match=f"{WEIGHTS} lacks 1 tensors"):
            load(name, folder, **way)

    def test_another_shape(self, name, folder, way):
        edit(folder, lambda weights: weights.update({TENSORS[name][0]: torch.zeros(3, 5)}))
        with pytest.raises(ValueError, match=rf"'{TENSORS[name][0]}' in .*{WEIGHTS} must have .*got \[3, 5\]"):
            load(name, folder, **way)

    def test_block_behind_the_last(self, name, folder, way):
        edit(folder, lambda weights: weights.update({TENSORS[name][1]: torch.zeros(3)}))
        with pytest.raises(ValueError, match=f"{WEIGHTS} has 1 tensors of blocks that the model lacks, such as"):
            load(name, folder, **way)


def test_fewer_layers_than_in_the_file(tmp_path):
    tiny.transformer(diffusers_sana).save_pretrained(tmp_path)
    for arguments in ({"num_layers": 1}, {}):
        if not arguments:
            config = json.loads((tmp_path / "config.json").read_text()) | {"num_layers": 1}
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="blocks that the model lacks, such as 'transformer_blocks"):
            diffusers_sana.SanaTransformer2DModel.from_pretrained(tmp_path, **arguments)


def test_other_tensors_are_one_warning(name, folder, caplog):
    edit(folder, lambda weights: weights.update({"pos_embed": torch.zeros(3), "more.weight": torch.zeros(2)}))
    with caplog.at_level(logging.WARNING):
        load(name, folder)
    (message,) = [record.message for record in caplog.records if "not used" in record.message]
    assert "pos_embed" in message
    assert "more.weight" in message


def test_sizes_that_may_mismatch(name, folder):
    edit(folder, lambda weights: weights.update({TENSORS[name][0]: torch.zeros(3, 5)}))
    model = load(name, folder, low_cpu_mem_usage=False, ignore_mismatched_sizes=True)
    assert model.get_parameter(TENSORS[name][0]).shape != (3, 5)


@pytest.mark.parametrize("way", WAYS, ids=str)
class TestShards:
    @pytest.fixture
    def folder(self, name, tmp_path):
        MODELS[name]().save_pretrained(tmp_path / "model", max_shard_size="4KB")
        return tmp_path / "model"

    def test_all_there(self, name, folder, way):
        assert len(list(folder.glob("*.safetensors"))) > 1
        load(name, folder, **way)

    def test_index_that_names_what_is_not_there(self, name, folder, way):
        index = folder / f"{WEIGHTS}.index.json"
        content = json.loads(index.read_text())
        shard = folder / content["weight_map"][TENSORS[name][0]]
        weights = load_file(shard)
        del weights[TENSORS[name][0]]
        save_file(weights, shard)
        with pytest.raises(
            OSError, match=rf"index.json does not match its files for 1 tensors, such as '{TENSORS[name][0]}'"
        ):
            load(name, folder, **way)

    def test_missing(self, name, folder, way):
        index = folder / f"{WEIGHTS}.index.json"
        content = json.loads(index.read_text())
        shard = folder / content["weight_map"].pop(TENSORS[name][0])
        weights = load_file(shard)
        del weights[TENSORS[name][0]]
        save_file(weights, shard)
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"index.json lacks 1 tensors .* '{TENSORS[name][0]}'"):
            load(name, folder, **way)

    @pytest.mark.parametrize(
        "content", ["[]", "{}", '{"metadata": {}}', '{"metadata": {}, "weight_map": {"a": 3}}', "{", "\udc80"]
    )
    def test_damaged_index(self, name, folder, way, content):
        (folder / f"{WEIGHTS}.index.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(OSError, match=r"index\.json"):
            load(name, folder, **way)


@pytest.mark.parametrize("way", WAYS, ids=str)
class TestDamage:
    def test_cut_off_weights(self, name, folder, way):
        file = folder / WEIGHTS
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(OSError, match=rf"{WEIGHTS} is damaged or truncated: .* Download it again"):
            load(name, folder, **way)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[]", "must contain a JSON object, got list"),
            ("null", "must contain a JSON object, got NoneType"),
            ('{"num_layers": 2', "is damaged"),
            ("", "is damaged"),
            ("[" * 100_000, "is damaged"),
        ],
        ids=["list", "null", "cut", "empty", "deep"],
    )
    def test_config_that_is_none(self, name, folder, way, content, message):
        (folder / "config.json").write_text(content)
        with pytest.raises(OSError, match=rf"config\.json {message}"):
            load(name, folder, **way)

    def test_error_leaves_the_default_dtype(self, name, folder, way):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "in_channels": -1}))
        with pytest.raises(ValueError, match=r"config\.json: `in_channels` must be at least 1"):
            load(name, folder, **way)
        assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "value", [5, [], "int4", {}, {"quant_method": None}, {"quant_method": "svdquant", "rank": "x"}]
)
def test_quantization_that_cannot_be_meant(name, folder, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    with pytest.raises(ValueError, match=r"config\.json: "):
        load(name, folder)


def test_errors_about_arguments_stay(name, folder):
    with pytest.raises(ValueError, match="You cannot set `low_cpu_mem_usage` to `False` while using device_map"):
        load(name, folder, low_cpu_mem_usage=False, device_map="cpu")
    with pytest.raises(OSError, match=r"no file named diffusion_pytorch_model\.fp16\.bin"):
        load(name, folder, variant="fp16")


def test_saved_with_a_lora_beside_the_layers(tmp_path):
    model = tiny.transformer(diffusers_sana)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    diffusers.ModelMixin.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="was saved with a LoRA attached"):
        diffusers_sana.SanaTransformer2DModel.from_pretrained(tmp_path)


def test_by_way_of_a_pipeline(tmp_path):
    folder = tiny.write_official_folder(tmp_path)
    edit(folder / "vae", lambda weights: weights.pop("encoder.conv_in.weight"))
    with pytest.raises(ValueError, match=rf"vae/{WEIGHTS} lacks 1 tensors of the model"):
        diffusers_sana.SanaPipeline.from_pretrained(folder)
    (folder / "transformer" / "config.json").write_text("[]")
    with pytest.raises(OSError, match=r"transformer/config\.json must contain a JSON object"):
        diffusers_sana.SanaPipeline.from_pretrained(folder)


FIELDS = {
    "SanaTransformer2DModel": {
        "num_layers": (0, -1, 100_000, 2**63, 1.5, "3", None, True),
        "norm_eps": (0, -1e-6, float("nan"), float("inf"), 2**63, "1e-6"),
        "timestep_scale": (float("inf"), float("nan"), 0, "1"),
        "patch_size": (0, -1, 1.0, 17),
        "guidance_embeds": ("no", 1, None),
        "attention_bias": (0,),
        "mlp_ratio": (0, -2.5, float("nan"), 1e-9),
        "dropout": (-0.1, 1.5, float("nan")),
        "sample_size": (0, None),
        "in_channels": (0, 2**40),
        "interpolation_scale": (0, float("nan")),
        "guidance_embeds_scale": (float("nan"), "x"),
    },
    "SanaControlNetModel": {"num_layers": (0, 100_000), "norm_eps": (float("nan"),), "patch_size": (0,)},
    "AutoencoderDC": {
        "scaling_factor": (0, -1, float("nan"), float("inf"), "x", None),
        "latent_channels": (0, 2.0),
        "attention_head_dim": (0,),
        "encoder_layers_per_block": ((1, 100_000), (1, -1), 3, (1, 1.5)),
        "decoder_block_out_channels": ((8, 0), (8, 2**40), (), 8, ("8", "8")),
        "encoder_qkv_multiscales": ((), ((), (100_001,)), ((), 5), 7),
        "decoder_act_fns": ((1, 2), 5),
        "decoder_norm_types": (("x", []),),
        "encoder_out_shortcut": ("yes",),
        "upsample_block_type": (3,),
    },
}


@pytest.mark.parametrize(("model", "field"), [(model, field) for model in FIELDS for field in FIELDS[model]])
def test_config_values_that_cannot_be_meant(model, field, tmp_path):
    config = {name: each for name, each in MODELS[model]().config.items() if name[0] != "_"}
    cls = getattr(diffusers_sana, model)
    for value in FIELDS[model][field]:
        with pytest.raises((TypeError, ValueError), match=f"`{field}`"):
            cls(**config | {field: value})
        (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ValueError, match=rf"config\.json: .*`{field}`"):
            cls.from_pretrained(tmp_path)
