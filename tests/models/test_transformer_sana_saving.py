"""Saving and loading, alone and with the diffusers class on the other side."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from tests.models.sana_transformers import FAMILIES, tiny_inputs, tiny_model
from tests.numerics import assert_close_fp32


def assert_equal_outputs(model, other):
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, other.eval()(**inputs).sample)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded, info = SanaTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_equal_outputs(model, loaded)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("writer", ["ours", "diffusers"])
def test_exchange_with_diffusers(family, writer, tmp_path):
    model = tiny_model(family)
    saver, loader = SanaTransformer2DModel, diffusers.SanaTransformer2DModel
    if writer == "diffusers":
        saver, loader = loader, saver
    saved = saver.from_config(dict(model.config))
    saved.load_state_dict(model.state_dict())
    saved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "SanaTransformer2DModel"
    loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert_close_fp32(loaded.eval()(**inputs).sample, model(**inputs).sample)


@pytest.mark.parametrize(
    "writer", [SanaTransformer2DModel, diffusers.SanaTransformer2DModel], ids=["ours", "diffusers"]
)
def test_sharded_variant(writer, tmp_path):
    model = tiny_model()
    saved = writer.from_config(dict(model.config))
    saved.load_state_dict(model.state_dict())
    saved.save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert all(name.startswith("diffusion_pytorch_model.fp16-0000") for name in files)
    assert_equal_outputs(model, SanaTransformer2DModel.from_pretrained(tmp_path, variant="fp16"))
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        SanaTransformer2DModel.from_pretrained(tmp_path, variant="bf16")


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_in_half_precision(low_cpu_mem_usage, tmp_path):
    model = tiny_model("sana_4k")
    model.save_pretrained(tmp_path)
    loaded = SanaTransformer2DModel.from_pretrained(
        tmp_path, dtype=torch.bfloat16, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = model.to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_positional_table_is_not_saved(tmp_path):
    model = tiny_model("sana_2k")
    with torch.no_grad():
        model(**tiny_inputs(model))
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "diffusion_pytorch_model.safetensors") if "pos" in key]


def test_old_configurations_take_the_defaults(tmp_path):
    """The first checkpoints were written before these fields existed."""
    model = tiny_model("sana")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for field in ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale", "interpolation_scale"):
        del config[field]
    path.write_text(json.dumps(config | {"_diffusers_version": "0.32.0.dev0"}))
    loaded = SanaTransformer2DModel.from_pretrained(tmp_path)
    assert (loaded.config["guidance_embeds_scale"], loaded.config["timestep_scale"]) == (0.1, 1.0)
    assert_equal_outputs(model, loaded)
