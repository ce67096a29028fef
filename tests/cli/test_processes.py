"""The command line, run as separate processes: what it prints on a clean run, signals, the Hub, closed pipes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.two_processes import ROOT


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "diffusers_sana.cli"]


@pytest.fixture(autouse=True)
def _default_interrupt():
    """Children do not ignore Ctrl-C, however the tests were started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*argv: str, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMMAND, *argv], env=ENVIRONMENT, **pipes | options)


def end(process: subprocess.Popen) -> tuple[int, list[str], list[str]]:
    try:
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out.splitlines(), error.splitlines()


def test_a_clean_run_prints_nothing_else(tmp_path):
    """With a LoRA, for which peft and bitsandbytes are imported where they are installed."""
    options = ["--lora", "sana-emoji-pixel-art", "--steps", "1", "--out", str(tmp_path)]
    code, out, error = end(start("generate", "an apple", *options))
    assert out == [str(tmp_path / "an-apple-seed0.png")]
    assert len(error) == 1, error
    assert error[0].startswith("loaded in ")
    assert code == 0


def test_interruption_while_images_are_generated(tmp_path):
    process = start("generate", "an apple", "--num-images", "10000", "--steps", "1", "--out", "new", cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not list(tmp_path.rglob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, _, error = end(process)
    assert code == 130
    assert error == ["diffusers-sana generate: interrupted"]
    assert all(path.suffix == ".png" and path.name[0] != "." for path in (tmp_path / "new").iterdir())


def test_a_hub_that_cannot_be_reached(tmp_path):
    code, out, error = end(start("generate", "a fox", "--model", "some/model", cwd=tmp_path))
    assert (code, out, len(error)) == (1, [], 1)
    assert "there is no folder some/model, and the Hub cannot be reached" in error[0]


def test_a_reader_that_has_gone(tmp_path):
    """`diffusers-sana completion bash | true`: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start("completion", "bash", stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=300)[1] == ""
    assert process.returncode == 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion():
    def complete(*words: str) -> set[str]:
        script = 'eval "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        script += (
            '_diffusers_sana "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"; echo "${COMPREPLY[@]}"'
        )
        found = subprocess.run(["bash", "-c", script, shell, "diffusers-sana", *words], capture_output=True, text=True)
        assert found.stderr == ""
        return set(found.stdout.split())

    shell = subprocess.run([*COMMAND, "completion", "bash"], env=ENVIRONMENT, capture_output=True, text=True).stdout
    assert complete("ge") == {"generate"}
    assert complete("generate", "--se") == {"--seed"}
    assert complete("generate", "--scheduler", "") == {"dpm++", "euler", "heun", "unipc", "deis"}
    assert complete("generate", "--model", "sana-emoji-p") == {"sana-emoji-pixel-art"}
    assert complete("generate", "fox") == set()
