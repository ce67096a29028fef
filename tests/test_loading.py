"""What the name of a model stands for, read from its index."""

import json

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import save_file

from diffusers_sana import checkpoints, loading
from diffusers_sana.loading import checkpoint_path, default_dtype, find_pipeline_class, pipeline_class_name


def test_bundled_names():
    assert checkpoint_path("sana-emoji") == checkpoints.SANA_EMOJI
    assert checkpoint_path("some/model") == "some/model"
    assert pipeline_class_name("sana-emoji") == pipeline_class_name(checkpoints.SANA_EMOJI) == "SanaPipeline"
    assert pipeline_class_name("vila-u-emoji") == "VilaUPipeline"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SanaPipeline", "SanaPipeline"),
        ("SanaSprintPipeline", "SanaSprintPipeline"),
        ("SanaPAGPipeline", "DiffusionPipeline"),
        ("FluxPipeline", "DiffusionPipeline"),
    ],
)
def test_class_of_a_folder(tmp_path, name, expected):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    (tmp_path / "config.json").write_text("{}")
    assert pipeline_class_name(str(tmp_path)) == name
    assert find_pipeline_class(str(tmp_path)).__name__ == expected


def test_class_of_a_folder_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert pipeline_class_name(str(tmp_path)) == "VilaUPipeline"


@pytest.mark.parametrize("content", ["{", "[]", "{}", "3"])
def test_damaged_index(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(OSError, match=r"model_index\.json must be JSON with a `_class_name`"):
        pipeline_class_name(str(tmp_path))


def test_folder_without_an_index(tmp_path):
    with pytest.raises(OSError, match=r"has neither a model_index\.json nor a config\.json"):
        pipeline_class_name(str(tmp_path))


def test_repositories(tmp_path, monkeypatch):
    """The index is downloaded; a transformers repository has none."""
    (tmp_path / "config.json").write_text("{}")

    def download(repository, file):
        if file != "config.json":
            raise absent
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    absent = EntryNotFoundError("404")
    assert pipeline_class_name("some/model") == "VilaUPipeline"
    absent = LocalEntryNotFoundError("offline")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: object())  # known not to exist
    assert pipeline_class_name("some/model") == "VilaUPipeline"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "there is no folder some/model, and the Hub cannot be reached: offline"),
        (OSError("404"), "there is no folder some/model, and the Hub has no such repository: 404"),
    ],
)
def test_no_such_repository(monkeypatch, error, message):
    assert issubclass(HfHubHTTPError, OSError)  # what the Hub answers with

    def download(*_):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(OSError, match=message):
        pipeline_class_name("some/model")


def test_names_that_no_repository_has():
    with pytest.raises(OSError, match="there is no folder no/such/folder, and the Hub has no such repository"):
        pipeline_class_name("no/such/folder")


def test_names_without_an_owner():
    """Most likely a bundled checkpoint was meant; the Hub is not asked."""
    with pytest.raises(FileNotFoundError, match=r"no folder sana-emoij, and the bundled checkpoints are sana-emoji, "):
        pipeline_class_name("sana-emoij")


def test_bundled_parts():
    assert pipeline_class_name("sana-emoji-sprint") == "SanaSprintPipeline"
    with pytest.raises(
        FileNotFoundError, match="is a component, a SanaControlNetModel; name the folder of a pipeline"
    ):
        pipeline_class_name("sana-emoji-edges")


@pytest.mark.parametrize(
    ("stored", "cpu", "gpu"),
    [
        (torch.float32, "bfloat16", "bfloat16"),
        (torch.bfloat16, "bfloat16", "bfloat16"),
        (torch.float16, "float16", "float16"),
    ],
)
def test_default_dtype(tmp_path, monkeypatch, stored, cpu, gpu):
    """Small models are computed in float32 on a CPU. Packed weights of quantized models do not count as floats."""
    (tmp_path / "transformer").mkdir()
    tensors = {"packed": torch.zeros(1000, dtype=torch.uint8), "a": torch.zeros(100, dtype=stored)}
    save_file(tensors | {"b": torch.zeros(3)}, tmp_path / "transformer" / "weights.safetensors")
    save_file({"a": torch.zeros(2000).half()}, tmp_path / "transformer" / "weights.fp16.safetensors")
    place = str(tmp_path)
    assert default_dtype(place, "cpu") == "float32"
    assert default_dtype(place, "cuda") == gpu
    assert default_dtype(place, "cuda:1", variant="fp16") == "float16"
    assert default_dtype("some/model", "cuda") == "bfloat16"
    monkeypatch.setattr("diffusers_sana.loading.SMALL", 1000)
    assert default_dtype(place, "cpu") == cpu


def test_bundled_checkpoint_that_is_not_installed(monkeypatch, tmp_path):
    """Published wheels leave it out."""
    monkeypatch.setitem(loading.BUNDLED, "vila-u-emoji", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="run pip install diffusers_sana_vila_u_emoji"):
        loading.pipeline_class_name("vila-u-emoji")
