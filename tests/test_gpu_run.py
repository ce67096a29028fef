"""`tools/gpu_run.sh` in the place of the interpreter of a GPU host: a script that notes what it is asked for."""

import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$NOTES"
case "$2" in
    *rms_norm*) find "${PYTHONPATH%%:*}" -type f >> "$NOTES"; exit ${SMOKE:-0};;
    zipfile) exec "$REAL" "$@";;
    pytest) trap 'echo interrupted; exit 2' INT; echo passed; sleep "${CHECK:-0}" & wait $!; exit 0;;
    benchmarks.bench_gpu) echo measured; exit 0;;
esac
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "a_host-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_host/__init__.py", "")

    for name, value in {"PY": python, "REAL": sys.executable, "NOTES": tmp_path / "notes"}.items():
        monkeypatch.setenv(name, str(value))

    def start(**environment):
        environment = os.environ | environment
        command = [ROOT / "tools" / "gpu_run.sh", tmp_path / "out", tmp_path / "wheels"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.returncode, (tmp_path / "notes").read_text(), tmp_path / "out"

    # Children do not ignore an interruption, however the tests were started.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield start
    signal.signal(signal.SIGINT, before)


def test_the_whole_run(run):
    code, notes, out = run()
    assert code == 0
    assert "a_host/__init__.py" in notes  # in front of the installed packages
    started = re.findall(r"^-(?:c|m \S+)", notes, re.MULTILINE)
    assert started == ["-m zipfile", "-c", "-m pytest", "-m benchmarks.bench_gpu"]
    assert float(re.search(r"bench_gpu --minutes ([\d.]+)", notes)[1]) == pytest.approx(515 / 60, abs=0.2)
    assert f"--results {out}/results" in notes
    assert {path.name for path in out.iterdir()} == {"run.log", "smoke.log", "check.log", "bench.log"}
    assert (out / "check.log").read_text() == "passed\n"


def test_nothing_runs_after_a_first_kernel_that_fails(run):
    code, notes, out = run(SMOKE="3")
    assert code == 3
    assert "-m pytest" not in notes
    assert "smoke ended with 3" in (out / "run.log").read_text()


def test_checks_that_take_too_long_are_interrupted(run):
    start = time.monotonic()
    code, notes, out = run(CHECK="30", LIMIT="3")
    assert time.monotonic() - start < 20
    assert code == 1
    assert (out / "check.log").read_text() == "passed\ninterrupted\n"
    assert "bench_gpu" in notes


def test_the_same_checks_as_in_the_makefile():
    files = r"tests/kernels tests/test_gpu\.py|--ignore \S+"
    script, makefile = ((ROOT / name).read_text() for name in ("tools/gpu_run.sh", "Makefile"))
    assert re.findall(files, script) == re.findall(files, makefile)
