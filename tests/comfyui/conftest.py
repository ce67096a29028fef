"""A stub of a ComfyUI server, with the nodes loaded in it."""

import sys

import pytest

from diffusers_sana import SanaPipeline
from tests import tiny
from tests.comfyui.stub import Server, call, load_nodes
from tests.loaders.lora.lora_files import TRANSFORMER


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    for name in ("diffusers", "loras", "controlnet"):
        (models / name).mkdir()
    tiny.write_official_folder(models / "diffusers" / "tiny", **TRANSFORMER)
    return Server(models)


@pytest.fixture(autouse=True)
def _as_at_the_start(server):
    yield
    server.args.preview_method, server.interrupt_at = type(server.args.preview_method)["NoPreviews"], None
    server.updates.clear()
    server.previews.clear()


@pytest.fixture(scope="module")
def nodes(server):
    with pytest.MonkeyPatch.context() as patch:
        for name, module in server.modules().items():
            patch.setitem(sys.modules, name, module)
        yield load_nodes("custom_nodes_sana")


@pytest.fixture(scope="module")
def folder(server):
    return server.models / "diffusers" / "tiny"


@pytest.fixture(scope="module")
def model(nodes):
    return call(nodes, "SanaLoad", model="tiny")[0]


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = SanaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
