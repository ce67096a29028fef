"""The nodes of `comfyui/`, run as ComfyUI runs them: by what they declare, and without ComfyUI."""

import ast
import importlib.util
import inspect
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from diffusers_sana import SanaImg2ImgPipeline, SanaPipeline
from tests import tiny
from tests.loaders.lora.lora_files import FORMATS, TRANSFORMER, random_lora


FOLDER = Path(__file__).parent.parent / "comfyui"
PROMPT = "a fox"
SETTINGS = {"prompt": PROMPT, "steps": 2, "seed": 7}


def load_nodes(name: str) -> ModuleType:
    """By path and under any name, as ComfyUI does."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nodes():
    return load_nodes("custom_nodes_sana")


def call(nodes: ModuleType, node: str, **values):
    """The outputs of a node: its function with the declared defaults and `values`, of the declared types."""
    node_class = nodes.NODE_CLASS_MAPPINGS[node]
    declared = node_class.INPUT_TYPES()["required"]
    assert set(values) <= set(declared)
    inputs = {name: rest[0]["default"] for name, (_, *rest) in declared.items() if rest and "default" in rest[0]}
    inputs |= values
    assert set(inputs) == set(declared)
    with torch.inference_mode():  # as ComfyUI does
        outputs = getattr(node_class(), node_class.FUNCTION)(**inputs)
    assert len(outputs) == len(node_class.RETURN_TYPES)
    for output, kind in zip(outputs, node_class.RETURN_TYPES, strict=True):
        assert isinstance(output, {"IMAGE": torch.Tensor, "SANA_MODEL": nodes.SanaModel}[kind])
        if kind == "IMAGE":
            assert output.dtype == torch.float32
            assert output.shape[-1] == 3
            assert 0 <= output.min() < output.max() <= 1
    return outputs[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_official_folder(tmp_path_factory.mktemp("sana"), **TRANSFORMER)


@pytest.fixture(scope="module")
def model(nodes, folder):
    return call(nodes, "SanaLoad", model=str(folder), dtype="float32")


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = SanaPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def expected(pipe, **options):
    """The pipeline's own images `[B, H, W, 3]`."""
    options = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "pt", **options}
    return pipe(generator=torch.Generator().manual_seed(7), **options).images.movedim(1, -1)


def test_mappings(nodes):
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.NODE_CLASS_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        assert node.CATEGORY
        assert inspect.getdoc(node)


def test_sample(nodes, model, pipe):
    assert torch.equal(call(nodes, "SanaSample", model=model, **SETTINGS), expected(pipe))
    size = {"height": 32, "width": 64}
    options = {"guidance_scale": 3.0, "negative_prompt": "grey", **size}
    images = call(nodes, "SanaSample", model=model, batch_size=2, **options, **SETTINGS)
    assert images.shape == (2, 32, 64, 3)
    assert torch.equal(images, expected(pipe, num_images_per_prompt=2, **options))


def test_image_to_image(nodes, model, pipe):
    image = call(nodes, "SanaSample", model=model, **SETTINGS)
    changed = call(nodes, "SanaImageToImage", model=model, image=image, strength=0.5, **SETTINGS)
    change = SanaImg2ImgPipeline.from_pipe(pipe)
    assert torch.equal(changed, expected(change, image=image.movedim(-1, 1), strength=0.5))
    assert not torch.allclose(changed, image, atol=0.02)


def test_lora_is_in_one_branch_only(nodes, model, pipe, tmp_path):
    lora = random_lora(pipe.transformer)
    path = str(tmp_path / "kohya.v1.safetensors")
    save_file(FORMATS["kohya"](lora), path)
    without = call(nodes, "SanaSample", model=model, **SETTINGS)
    with torch.inference_mode():  # parameters that could be trained are multiplied in another order
        pipe.load_lora_weights(path, adapter_name="lora")
        images = {}
        for strength in (1.0, 0.25):
            pipe.set_adapters("lora", strength)
            images[strength] = expected(pipe)
        pipe.unload_lora_weights()
    strong = call(nodes, "SanaLora", model=model, lora=path)
    weak = call(nodes, "SanaLora", model=model, lora=path, strength=0.25)
    twice = call(nodes, "SanaLora", model=call(nodes, "SanaLora", model=weak, lora=path, strength=0.5), lora=path)
    twice = call(nodes, "SanaLora", model=twice, lora=path, strength=-1.5)
    order = (strong, images[1.0]), (weak, images[0.25]), (model, without), (twice, images[0.25])
    for branch, expected_image in order:
        assert torch.equal(call(nodes, "SanaSample", model=branch, **SETTINGS), expected_image)
    assert not torch.allclose(images[1.0], images[0.25], atol=0.02)
    image = call(nodes, "SanaImageToImage", model=strong, image=without, strength=1.0, **SETTINGS)
    assert torch.equal(image, images[1.0])  # at strength 1 the image leaves no trace


def test_a_lora_file_that_was_replaced(nodes, pipe, folder, tmp_path):
    """It is read anew, and weights that no branch uses any more are not kept."""
    path, changed = tmp_path / "lora.safetensors", nodes.NODE_CLASS_MAPPINGS["SanaLora"].IS_CHANGED
    lora = random_lora(pipe.transformer)
    save_file(FORMATS["kohya"](lora), path)
    model = call(nodes, "SanaLoad", model=str(folder), dtype="float32")
    branch, other = (call(nodes, "SanaLora", model=model, lora=str(path), strength=s) for s in (1.0, 0.5))
    first = call(nodes, "SanaSample", model=branch, **SETTINGS)
    asked = changed(model=None, lora=str(path), strength=1.0)
    assert changed(model=None, lora=str(path), strength=0.5) == asked
    save_file({name: tensor * 1.5 for name, tensor in FORMATS["kohya"](lora).items()}, path)
    os.utime(path, ns=(1, 1))
    assert changed(model=None, lora=str(path), strength=1.0) != asked
    second = call(nodes, "SanaSample", model=branch, **SETTINGS)
    assert not torch.allclose(first, second, atol=1e-3)
    assert len(model.pipe.transformer.peft_config) == 1
    del branch
    call(nodes, "SanaSample", model=other, **SETTINGS)
    assert len(model.pipe.transformer.peft_config) == 1
    del other
    without = call(nodes, "SanaSample", model=model, **SETTINGS)
    assert not getattr(model.pipe.transformer, "peft_config", {})
    assert torch.equal(without, expected(pipe))


def test_a_model_folder_that_was_replaced(nodes, folder, tmp_path):
    copied, changed = shutil.copytree(folder, tmp_path / "model"), nodes.NODE_CLASS_MAPPINGS["SanaLoad"].IS_CHANGED
    asked = changed(model=str(copied), dtype="float32")
    assert changed(model=str(copied), dtype="float32") == asked
    os.utime(copied / "transformer" / "config.json", ns=(1, 1))
    assert changed(model=str(copied), dtype="float32") != asked


def test_four_bits(nodes, folder, model, tmp_path):
    quantized = call(nodes, "SanaLoad", model=str(folder), dtype="float32", four_bit=True)
    image = call(nodes, "SanaSample", model=quantized, **SETTINGS)
    assert quantized.pipe.transformer.is_quantized
    difference = (image - call(nodes, "SanaSample", model=model, **SETTINGS)).abs().mean()
    assert 0 < difference < 0.1
    quantized.pipe.save_pretrained(tmp_path)
    loaded = call(nodes, "SanaLoad", model=str(tmp_path), dtype="float32")
    assert loaded.pipe.transformer.is_quantized
    assert (call(nodes, "SanaSample", model=loaded, **SETTINGS) - image).abs().mean() < 0.02


def test_bundled(nodes):
    model = call(nodes, "SanaLoad", model="sana-emoji", dtype="float32")
    assert call(nodes, "SanaSample", model=model, **SETTINGS).shape == (1, 128, 128, 3)


def test_errors(nodes):
    with pytest.raises(ValueError, match="`model` must be a Sana or a SANA-Sprint, but 'vila-u-emoji' is a VilaU"):
        call(nodes, "SanaLoad", model="vila-u-emoji")


def test_progress_bar_of_comfyui(monkeypatch, folder):
    """With the one class of ComfyUI's that the nodes use."""
    seen = []

    class ProgressBar:
        def __init__(self, total):
            seen.append(total)

        def update_absolute(self, value, total=None):
            seen.append((value, total))

    utils = ModuleType("comfy.utils")
    utils.ProgressBar = ProgressBar
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    nodes = load_nodes("custom_nodes_sana_with_bar")
    model = call(nodes, "SanaLoad", model=str(folder), dtype="float32")
    call(nodes, "SanaSample", model=model, **SETTINGS)
    assert seen == [2, (1, 2), (2, 2)]
    seen.clear()
    settings = {**SETTINGS, "steps": 4}
    call(nodes, "SanaImageToImage", model=model, image=torch.rand(1, 32, 32, 3), strength=0.5, **settings)
    assert seen == [4, (1, 2), (2, 2)]  # half of the steps are enough for half of the noise


def test_public_names_only():
    """The nodes are an example of how to use the package."""
    tree = ast.parse((FOLDER / "__init__.py").read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if "sana" in name} == {"diffusers_sana"}
