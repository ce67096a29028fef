"""How far it is from a pipeline's `__call__` to an operation, and how long the `__call__`s are."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import diffusers_sana
from tests import tiny


ROOT = Path(diffusers_sana.__file__).parent
# Operations are the files of kernels/ with a Triton kernel of the same name.
OPERATIONS = {ROOT / "kernels" / path.name for path in (ROOT / "kernels" / "triton").glob("[!_]*.py")}
QK_NORM = {"qk_norm": "rms_norm_across_heads"}  # SANA-1.5


def test_at_most_four_files_from_a_call_to_an_operation():
    """Counted in the denoising loop, for every operation of the transformer."""
    pipe = tiny.pipeline(diffusers_sana, **QK_NORM)
    pipe.set_progress_bar_config(disable=True)
    found = {}

    def profile(frame, event, argument):
        operation = Path(frame.f_code.co_filename)
        if event != "call" or operation not in OPERATIONS:
            return
        files = []
        while frame := frame.f_back:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and path not in files:
                files.append(path)
        if ROOT / "pipelines" / "sampling.py" in files:
            names = [path.name for path in files if not path.is_relative_to(ROOT / "kernels")]
            found[operation.stem] = max(found.get(operation.stem, []), names, key=len)

    sys.setprofile(profile)
    try:
        pipe("a cat", num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0))
    finally:
        sys.setprofile(None)
    assert {"relu_linear_attention", "modulated_layer_norm", "gated_residual", "rms_norm"} <= found.keys()
    for operation, names in found.items():
        assert names[-2:] == ["sampling.py", "pipeline_sana.py"]
        assert len(names) <= 4, f"{operation}: {names}"


PIPELINES = sorted((ROOT / "pipelines").glob("pipeline_sana*.py"))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_calls_are_short(path):
    """At most 60 lines from the end of the docstring to the end of `__call__`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "__call__":
            assert ast.get_docstring(node)
            assert node.end_lineno - node.body[0].end_lineno <= 60
