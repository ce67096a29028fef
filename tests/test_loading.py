"""What the name of a model stands for, read from its index."""

import json

import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from diffusers_sana import checkpoints
from diffusers_sana.loading import checkpoint_path, find_pipeline_class, pipeline_class_name


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
