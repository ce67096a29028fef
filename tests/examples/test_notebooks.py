"""The notebooks run from top to bottom, and are committed clean."""

from pathlib import Path

import pytest


nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


# Run before a notebook: the images to look at need 20 steps, the code and its assertions 3. A callback names steps.
FEWER_STEPS = """
import functools
from diffusers_sana import SanaPipeline

def fewer_steps(call):
    @functools.wraps(call)
    def run(self, *args, **kwargs):
        default = {} if "callback_on_step_end" in kwargs else {"num_inference_steps": 3}
        return call(self, *args, **default | kwargs)
    return run

SanaPipeline.__call__ = fewer_steps(SanaPipeline.__call__)
"""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_runs(path, tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what it saves
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FEWER_STEPS))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())}
    assert "image/png" in kinds


def test_is_committed_clean(path):
    """Of what it put out only images, and small ones: times and paths are those of one machine."""
    assert path.stat().st_size < 200_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.get("execution_count") is None
        for output in cell.get("outputs", ()):
            assert set(output.data) == {"image/jpeg"}
