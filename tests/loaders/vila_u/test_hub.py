"""VILA-U as a repository of the Hub: loaded by `trust_remote_code=True` alone, and its model card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import diffusers_sana
from diffusers_sana.loaders.vila_u.hub import FILES, add_remote_code, write_model_card
from tests.models.vila_u.tiny import shared_model, tiny_config
from tests.models.vila_u.tiny_processor import tiny_processor


LOAD = """
import json, sys
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == "diffusers_sana":
            raise ModuleNotFoundError("No module named 'diffusers_sana'")

folder, target = sys.argv[1:]
trust = {"trust_remote_code": True}
sys.meta_path.insert(0, NotInstalled())
try:
    AutoConfig.from_pretrained(folder, **trust)
except ImportError as error:
    message = str(error)
sys.meta_path.pop(0)

assert "diffusers_sana" not in sys.modules
processor = AutoProcessor.from_pretrained(folder, **trust)
model = AutoModelForMultimodalLM.from_pretrained(folder, **trust)
inputs = processor(text="cat", generation_mode="image")
codes = model.generate(**inputs, generation_mode="image", do_sample=False)

import diffusers_sana
from transformers import AutoImageProcessor
names = [(AutoConfig, "VilaUConfig"), (AutoImageProcessor, "VilaUImageProcessor"), (AutoProcessor, "VilaUProcessor")]
for auto, name in names:
    assert type(auto.from_pretrained(folder, **trust)) is getattr(diffusers_sana, name)
assert type(model) is diffusers_sana.VilaUForConditionalGeneration
for auto, reference in model.config.auto_map.items():
    assert get_class_from_dynamic_module(reference, folder) is getattr(diffusers_sana, reference.split(".")[1])

model.save_pretrained(target)
processor.save_pretrained(target)
print(json.dumps([message, codes.tolist()]))
"""


@pytest.fixture
def folder(tmp_path):
    shared_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_loads_without_the_import(folder, tmp_path):
    """In a separate process. What is saved again is JSON and weights: no copy of the package's files."""
    add_remote_code(folder)
    added = files(folder)
    add_remote_code(folder)
    assert files(folder) == added
    root = str(Path(diffusers_sana.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "saved")],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    message, codes = json.loads(result.stdout)
    assert "pip install diffusers_sana" in message
    inputs = tiny_processor()(text="cat", generation_mode="image")
    assert shared_model().generate(**inputs, generation_mode="image", do_sample=False).tolist() == codes
    assert set(files(tmp_path / "saved")) == set(added) - {f"{module}.py" for module in FILES}


def test_files_of_an_image_processor_alone(folder):
    tiny_processor().image_processor.save_pretrained(folder)
    before = json.loads((folder / "preprocessor_config.json").read_text())
    add_remote_code(folder)
    after = json.loads((folder / "preprocessor_config.json").read_text())
    assert after == before | {"auto_map": {"AutoImageProcessor": "image_processing_vila_u.VilaUImageProcessor"}}


def test_without_a_processor(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    add_remote_code(tmp_path)
    assert set(files(tmp_path)) == {"config.json"} | {f"{module}.py" for module in FILES}


def test_card(folder):
    with pytest.raises(ValueError, match="`add_remote_code` first"):
        write_model_card(folder, "me/cats", license="llama2")
    add_remote_code(folder)
    write_model_card(folder, "me/cats", license="llama2", base_model="mit-han-lab/vila-u-7b-256")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model) == ("llama2", "mit-han-lab/vila-u-7b-256")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "any-to-any")
    assert "| 32 x 32 pixels, 16 tokens with 3 codes each, codebook of 64 |" in card.text
    code = card.text.split("```python")[1].split("```")[0].replace("me/cats", str(folder))
    said: dict = {}
    torch.manual_seed(0)
    exec(code, said)  # the example of the card runs
    assert said["image"].size == (32, 32)
    assert "base model" not in write_model_card(folder, "me/cats", license="llama2").text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing"),
        ({"model_type": "vila_u_llama"}, "got 'vila_u_llama' in .* Convert an official"),
        ({}, "of type 'vila_u', got None"),
    ],
)
def test_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        add_remote_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))
