"""LoRA files that are damaged, not finite or of another model: an error names the file and the key."""

import json
import math

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusers_sana
from tests import tiny


NAME = "pytorch_lora_weights.safetensors"
KEY = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"


@pytest.fixture
def file(tmp_path):
    factors = {"A": torch.full((2, 16), 0.1), "B": torch.full((16, 2), 0.1)}
    layers = {f"transformer_blocks.0.attn1.to_q.lora_{half}.weight": value for half, value in factors.items()}
    diffusers.SanaPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    return tmp_path / NAME


@pytest.fixture
def load(file):
    """Loads the file by all ways there are; each must raise, and leave the transformer as it was."""
    pipe = tiny.pipeline(diffusers_sana)
    before = set(pipe.transformer.state_dict())

    def load(error, message):
        folder = file.parent
        for source, options in ((file, {}), (str(file), {}), (folder, {}), (folder, {"weight_name": NAME})):
            with pytest.raises(error, match=message):
                pipe.load_lora_weights(source, **options)
            assert set(pipe.transformer.state_dict()) == before

    return load


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_whole_file(file):
    pipe = tiny.pipeline(diffusers_sana)
    pipe.load_lora_weights(file)
    assert pipe.get_active_adapters() == ["default_0"]


def test_without_tensors(file, load):
    save_file({}, file)
    load(ValueError, r"must have the tensors of an adapter, but is empty")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(file, load, value):
    edit(file, lambda tensors: tensors[KEY][0].fill_(value))
    load(ValueError, rf"{file.parent}.*: '{KEY}' must be finite, but has NaN or infinite values")
    with pytest.raises(ValueError, match=f"'{KEY}' must be finite"):
        diffusers_sana.SanaPipeline.lora_state_dict(load_file(file))


@pytest.mark.parametrize("metadata", [{"r": 2, "lora_alpha": math.nan}, {"r": 2, "alpha_pattern": {"to_q": math.inf}}])
def test_metadata_that_is_not_finite(file, load, metadata):
    fields = {f"transformer.{name}": value for name, value in metadata.items()}
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(fields)})
    load(ValueError, r"in the metadata must be finite")


def test_cut_off(file, load):
    file.write_bytes(file.read_bytes()[:-20])
    load(OSError, rf"{NAME} is damaged or truncated: .* Download it again")


def test_not_safetensors(file, load):
    file.write_text("version https://git-lfs.github.com/spec/v1")
    load(OSError, rf"{NAME} is damaged")


def test_broken_metadata(file, load):
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": "{"})
    load(ValueError, rf"{file.parent}.*: ")


def test_half_of_a_layer(file, load):
    edit(file, lambda tensors: tensors.pop(KEY))
    load(ValueError, rf"{file.parent}.*: .*must have a second key")


def test_another_model(file, load):
    edit(file, lambda tensors: tensors.update({KEY: torch.zeros(2, 48)}))
    load(ValueError, rf"{file.parent}.*: .*must have size 16 in axis 1")


def test_peft_config_that_is_none(file):
    edit(
        file, lambda tensors: [tensors.update({f"base_model.model.{key}": tensors.pop(key)}) for key in list(tensors)]
    )
    (file.parent / "adapter_config.json").write_text("[]")
    with pytest.raises(OSError, match=r"adapter_config\.json must contain a JSON object"):
        tiny.pipeline(diffusers_sana).load_lora_weights(file.parent, weight_name=NAME)


def test_missing_file(file):
    with pytest.raises(OSError, match=r"other\.safetensors"):
        tiny.pipeline(diffusers_sana).load_lora_weights(file.parent, weight_name="other.safetensors")


def test_strength(file):
    pipe = tiny.pipeline(diffusers_sana)
    pipe.load_lora_weights(file)
    with pytest.raises(ValueError, match="`lora_scale` must be finite"):
        pipe.fuse_lora(["transformer"], lora_scale=math.nan)
