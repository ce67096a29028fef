"""The auto classes of transformers know VILA-U once the package is imported, in any order; `unregister` ends it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    pipeline,
)

import diffusers_sana
from tests.models.vila_u.tiny import shared_model, tiny_config, tiny_vision_config
from tests.models.vila_u.tiny_processor import tiny_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    shared_model().save_pretrained(path)
    return path


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_whole_model(folder, auto):
    model = auto.from_pretrained(folder)
    assert type(model) is diffusers_sana.VilaUForConditionalGeneration


def test_parts(folder):
    assert type(AutoConfig.from_pretrained(folder)) is diffusers_sana.VilaUConfig
    assert type(AutoModel.from_config(tiny_config())) is diffusers_sana.VilaUModel
    assert type(AutoModel.from_config(tiny_vision_config())) is diffusers_sana.VilaUVisionModel


def test_official_checkpoint_names_the_converter(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vila_u_llama"}))
    with pytest.raises(ValueError, match="convert_vila_u"):
        AutoModelForMultimodalLM.from_pretrained(tmp_path)


def test_unregistered(folder):
    diffusers_sana.unregister()
    try:
        with pytest.raises(ValueError, match="does not recognize this architecture"):
            AutoModelForMultimodalLM.from_pretrained(folder)
        assert "transformers.models.vila_u" not in sys.modules
    finally:
        diffusers_sana.register()
    assert type(AutoConfig.from_pretrained(folder)) is diffusers_sana.VilaUConfig


def test_pipeline(folder, tmp_path, monkeypatch):
    """Both modes. Its demand for torchvision is left out: VILA-U needs none."""
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tiny_processor().save_pretrained(tmp_path)
    pipe = pipeline("any-to-any", model=str(tmp_path))
    content = [{"type": "image", "image": Image.new("RGB", (9, 5))}, {"type": "text", "text": "cat?"}]
    [answer] = pipe([{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    assert isinstance(answer["generated_text"], str)
    made = pipe(["cat", "a"], generation_mode="image", processor_kwargs={"generation_mode": "image"})
    assert [item["generated_image"].size for item in made] == [(32, 32)] * 2


@pytest.mark.parametrize(
    "statement",
    [
        "import diffusers_sana; from diffusers import SanaPipeline",
        "from diffusers_sana.models.vila_u.configuration_vila_u import VilaUConfig",
    ],
)
def test_any_order_of_imports(statement):
    """Importing a host makes our entries, and these import nothing of ours but the configs."""
    check = """
import sys
assert not any(f"diffusers_sana.models.vila_u.{name}_vila_u" in sys.modules for name in ("modeling", "processing"))
from transformers import CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING as models, PROCESSOR_MAPPING as processors
from transformers.models.auto.processing_auto import processor_class_from_name
config = CONFIG_MAPPING["vila_u"]
assert models[config].__name__ == "VilaUForConditionalGeneration"
assert processors[config].__name__ == "VilaUProcessor"
assert processor_class_from_name("VilaUProcessor") is processors[config]
"""
    command, root = [sys.executable, "-c", statement + check], Path(diffusers_sana.__file__).parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
