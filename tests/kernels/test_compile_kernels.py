"""Every kernel compiles for every architecture, at the shapes of real models, without spilling registers.

In a separate process, because the interpreter that runs the other tests' kernels is chosen at import.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compile_kernels import RESULTS, SHARED_KIB
from benchmarks.kernel_benchmark import load, operations


ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("compiled") / "kernels.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(out.parent / "cache")}
    command = [sys.executable, "-m", "benchmarks.compile_kernels", "--first-case", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return json.loads(out.read_text())


def test_all_kernels_fit_all_architectures(report):
    for row in report["kernels"]:
        assert row["spilled_bytes"] == 0, row
        assert row["shared_kib"] <= SHARED_KIB[row["architecture"]], row
        assert row["registers"] <= 255 or row["architecture"] == "gfx942", row


def test_none_is_missing(report):
    names = set(operations())
    files = {path.stem for path in (ROOT / "diffusers_sana" / "kernels" / "triton").glob("*.py")}
    assert files - {"__init__", "low_bit", "requantize_rows", "rows"} == names
    for architecture in SHARED_KIB:
        compiled = {row["operation"] for row in report["kernels"] if row["architecture"] == architecture}
        assert compiled == names
        for benchmark in map(load, names):
            kernels = {row["kernel"] for row in report["kernels"] if row["operation"] == benchmark.name}
            assert len(kernels) >= len(benchmark.launches)


def test_the_committed_table_has_the_same_kernels(report):
    committed = json.loads(RESULTS.read_text())["kernels"]
    assert {row["kernel"] for row in committed} == {row["kernel"] for row in report["kernels"]}
