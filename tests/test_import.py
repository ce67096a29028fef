"""`import diffusers_sana` costs next to nothing, and works in any order with the imports of diffusers."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import diffusers_sana
from diffusers_sana import _compat


SCRIPT = """
import sys, time

start = time.process_time()  # not the clock: the machine may be busy
import diffusers_sana
seconds = time.process_time() - start
heavy = {"accelerate", "diffusers", "numpy", "peft", "torch", "transformers", "triton"} & set(sys.modules)
assert not heavy, heavy
assert seconds < 1, seconds

# Hosts that are imported after us, by their users.
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
assert "diffusers_sana" in LOADABLE_CLASSES
assert "diffusers_sana.pipelines.pipeline_sana" not in sys.modules
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING, _get_task_class
assert _get_task_class(AUTO_TEXT2IMAGE_PIPELINES_MAPPING, "SanaPipeline") is diffusers_sana.SanaPipeline

from diffusers.hooks._helpers import TransformerBlockRegistry
assert any(block.__name__ == "SanaTransformerBlock" for block in TransformerBlockRegistry._registry)
import torch
assert not torch.cuda.is_initialized()
assert not any(name.startswith("diffusers_sana.kernels.triton") for name in sys.modules)
"""


def test_fresh_process():
    command, folder = [sys.executable, "-c", SCRIPT], Path(diffusers_sana.__file__).parents[1]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_exports_exist():
    for name, module in diffusers_sana._EXPORTS.items():
        if "vila_u" in module and not _compat.supports_feature(_compat.VILA_U):
            assert name not in dir(diffusers_sana)
            with pytest.raises(_compat.MissingHostName, match=r"transformers>=5\.21"):
                getattr(diffusers_sana, name)
        else:
            assert name in dir(diffusers_sana)
            assert name.isupper() or getattr(diffusers_sana, name).__name__ == name


def test_star_import_is_the_public_api():
    """`dir()` and `import *` show what the package offers, and not the base classes that hosts look up in it."""
    names: dict = {}
    exec("from diffusers_sana import *", names)
    exported = {name for name in names if not name.startswith("__")}
    assert exported == set(diffusers_sana.__all__)
    if _compat.supports_feature(_compat.VILA_U):
        assert exported == {*diffusers_sana._EXPORTS, "register", "unregister"}
    assert {name for name in dir(diffusers_sana) if not name.startswith("__")} == exported
    for name, host in diffusers_sana._BASE_CLASSES.items():
        assert getattr(diffusers_sana, name) is getattr(import_module(host), name)


def test_star_import_works_where_transformers_is_too_old_for_vila_u(monkeypatch):
    monkeypatch.setattr(_compat, "version_of", {"transformers": "5.17.0"}.get)
    names: dict = {}
    exec("from diffusers_sana import *", names)
    assert {"SanaPipeline", "VILA_U_EMOJI", "quantize"} <= set(names)
    assert not {"VilaUModel", "VilaUPipeline", "convert_vila_u", "add_remote_code"} & set(names)


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"no attribute 'SanaPipelin'; it has .*'SanaPipeline'"):
        diffusers_sana.SanaPipelin  # noqa: B018
