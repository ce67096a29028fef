"""What ComfyUI, its page and its registry read of the node pack."""

import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest

from diffusers_sana import __version__
from tests.comfyui.stub import FOLDER, declared_inputs
from tools.test_comfyui import to_prompt


ROOT = FOLDER.parent
WORKFLOWS = sorted((FOLDER / "example_workflows").glob("*.json"))
# Nodes of ComfyUI 0.33.0 in the examples: inputs, outputs.
OF_COMFYUI = {
    "MaskComposite": ({"destination": "MASK", "source": "MASK", "x": 0, "y": 0, "operation": ""}, ["MASK"]),
    "PreviewAny": ({"source": "*"}, []),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": ""}, []),
    "SolidMask": ({"value": 0.0, "width": 0, "height": 0}, ["MASK"]),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, ["LATENT"]),
}


def test_declarations(nodes):
    """Names, descriptions and tooltips; a help page that has every input and output."""
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.NODE_CLASS_MAPPINGS.keys()
    assert len(set(nodes.NODE_DISPLAY_NAME_MAPPINGS.values())) == len(nodes.NODE_CLASS_MAPPINGS)
    pages = FOLDER / nodes.WEB_DIRECTORY / "docs"
    assert {page.stem for page in pages.glob("*.md")} == nodes.NODE_CLASS_MAPPINGS.keys()
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        assert node.CATEGORY.startswith("Sana")
        assert len(node.DESCRIPTION) > 20
        assert len(node.RETURN_NAMES) == len(node.RETURN_TYPES)
        text = (pages / f"{name}.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {node.DISPLAY_NAME}\n")
        inputs, outputs = (set(re.findall(r"^\| `(\w+)`", part, re.M)) for part in text.split("| output | |"))
        groups = node.INPUT_TYPES()
        assert inputs == {*groups["required"], *groups["optional"]}
        assert outputs == set(node.RETURN_NAMES)


def test_start_up_imports_nothing_heavy():
    """In a separate Python, which has torch already, as ComfyUI has; without ComfyUI's modules."""
    code = """
import importlib.util, sys, time, torch
before, start = set(sys.modules), time.process_time()
spec = importlib.util.spec_from_file_location("pack", "comfyui/__init__.py")
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for node in module.NODE_CLASS_MAPPINGS.values():
    node.INPUT_TYPES()
heavy = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not heavy & {"diffusers", "diffusers_sana", "transformers", "peft", "accelerate"}, heavy
assert time.process_time() - start < 1
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_lists(nodes, server):
    """Bundled models first, then what is in ComfyUI's folders, and of a pipeline only the pipeline."""
    names = nodes.NODE_CLASS_MAPPINGS["SanaLoad"].INPUT_TYPES()["required"]["model"][0]
    assert names == ["sana-emoji", "sana-emoji-sprint", "tiny"]
    other = server.models / "diffusers" / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    vila_u = server.models / "diffusers" / "deep" / "vila-u"
    vila_u.mkdir(parents=True)
    (vila_u / "config.json").write_text('{"model_type": "vila_u"}', encoding="utf-8")
    damaged = server.models / "diffusers" / "damaged"
    damaged.mkdir()
    (damaged / "model_index.json").write_text("{", encoding="utf-8")
    for folder, name in (("loras", "mine"), ("more", "mine"), ("more", "theirs")):
        (server.models / folder / "style").mkdir(parents=True, exist_ok=True)
        (server.models / folder / "style" / f"{name}.safetensors").write_bytes(folder.encode())
    (server.models / "loras" / "notes.txt").write_text("no weights", encoding="utf-8")
    places = sys.modules[nodes.__name__ + ".places"]
    assert places.SANA.names() == names
    assert places.VILA_U.names() == ["vila-u-emoji", "deep/vila-u"]
    assert places.LORAS.names() == ["sana-emoji-pixel-art", "style/mine.safetensors", "style/theirs.safetensors"]
    assert places.LORAS.place("style/mine.safetensors") == str(server.models / "loras/style/mine.safetensors")
    assert places.LORAS.place("style/theirs.safetensors") == str(server.models / "more/style/theirs.safetensors")
    assert places.LORAS.place("style/mine.safetensors", " name/on-the-hub ") == "name/on-the-hub"
    for outside in ("../diffusers/tiny", str(server.models / "loras" / "style" / "mine.safetensors")):
        with pytest.raises(ValueError, match="there is no"):
            places.LORAS.place(outside)


def test_public_names_only():
    """The nodes are an example of how to use the package."""
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and "sana" in (node.module or ""):
                assert node.module == "diffusers_sana"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_fit_the_nodes(nodes, path):
    """Every node has the inputs that it declares, and every link the type of both of its ends."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    prompt = to_prompt(workflow)
    kinds = {}
    for id, node in prompt.items():
        if node["class_type"] in OF_COMFYUI:
            inputs, outputs = OF_COMFYUI[node["class_type"]]
            required, declared = set(inputs), set(inputs)
            sockets = {name: (kind,) for name, kind in inputs.items()}
        else:
            node_class = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
            groups, outputs = node_class.INPUT_TYPES(), node_class.RETURN_TYPES
            sockets, required = {**groups["required"], **groups["optional"]}, declared_inputs(node_class)[1]
            declared = set(sockets)
        assert required <= node["inputs"].keys() <= declared
        kinds[id] = sockets, outputs
    for id, node in prompt.items():
        for name, value in node["inputs"].items():
            kind = kinds[id][0][name][0]
            if isinstance(value, list):
                given = kinds[value[0]][1][value[1]]
                assert kind in (given, "*"), f"{node['class_type']}.{name} gets {given}"
            elif isinstance(kind, list):
                assert value in kind
    assert any(node["class_type"] in nodes.NODE_CLASS_MAPPINGS for node in prompt.values())
    link_types = {link[0]: link[5] for link in workflow["links"]}
    for node in workflow["nodes"]:
        for slot, output in enumerate(node["outputs"]):
            assert output["type"] == kinds[str(node["id"])][1][slot]
            assert all(link_types[link] == output["type"] for link in output["links"])


def test_every_node_is_in_an_example(nodes):
    used = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    assert nodes.NODE_CLASS_MAPPINGS.keys() <= used


def test_metadata_for_the_registry():
    """The same requirements in both files, those of our package, and its version."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))
    requirements = (FOLDER / "requirements.txt").read_text(encoding="utf-8").split()
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["project"]["version"] == __version__
    assert project["project"]["dependencies"] == requirements
    assert project["project"]["requires-python"] == package["requires-python"]
    assert f"diffusers_sana>={__version__}" in requirements
    assert {line for line in package["optional-dependencies"]["train"] if line.startswith("peft")} < set(requirements)
    assert project["tool"]["comfy"]["DisplayName"] == "Sana"
