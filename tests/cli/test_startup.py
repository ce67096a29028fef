"""`--help` is fast, and errors of use come before anything heavy is imported. Each in a process of its own."""

import json
import resource
import subprocess
import sys

import pytest

from diffusers_sana.checkpoints import SANA_EMOJI, VILA_U_EMOJI


HEAVY = ("torch", "diffusers", "transformers", "numpy", "huggingface_hub")
# Runs a command line and prints what it said, and which heavy modules it imported.
RUN = f"""
import json, sys
from diffusers_sana.cli import main
try:
    main(sys.argv[1:])
    said = None
except SystemExit as error:
    said = str(error.code)
print(json.dumps([said, [name for name in {HEAVY} if name in sys.modules]]))
"""


def run(*arguments: str):
    """What the command line printed, said at its end, and imported; and the seconds of CPU time of the process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said, imported = json.loads(done.stdout.splitlines()[-1])
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return done.stdout + done.stderr + str(said), imported, seconds


@pytest.mark.parametrize("command", [[], ["generate"], ["evaluate"]])
def test_help(command):
    """In CPU time, since other processes of the machine do not slow that down; the best of three."""
    runs = [run(*command, "--help") for _ in range(3)]
    for printed, imported, _ in runs:
        assert "usage: diffusers-sana" in printed or "usage: -c" in printed
        assert imported == []
    assert min(seconds for _, _, seconds in runs) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a fox", "--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["generate", "a fox", "--num_images", "0"], "argument --num-images: must be at least 1, got 0"),
        (["generate", "a fox", "--guidance-scale", "nan"], "argument --guidance-scale: must be finite, got nan"),
        (["generate", "a fox", "--device", "gpu"], "argument --device: must be one of"),
        (["generate", "a fox", "--model", VILA_U_EMOJI, "--steps", "2"], "--steps must be left out for a VILA-U"),
        (["generate", "a fox", "--out", "fox.xyz"], "--out must end in an image format"),
        (["chat", "none.png", "what?"], "there is no file none.png"),
        (["quantize", SANA_EMOJI, "-o", "none", "--gptq"], "--gptq needs calibration data"),
        (["quantize", SANA_EMOJI, "-o", "none", "--prompts", "none.txt"], "none.txt"),
        (["evaluate", "some/model", "--detector", "x"], "--clip must be given, because checks ask for colors"),
        (["evaluate", "some/model", "--checks", "clip"], "--checks clip needs --clip"),
        (["evaluate", "sana-emoji", "--against", "none"], "there is no folder none"),
        (["convert", "none.pth", "-o", "none"], "there is no file none.pth"),
    ],
)
def test_errors_of_use(arguments, message):
    printed, imported, seconds = run(*arguments)
    assert message in printed
    assert imported == []
    assert seconds < 1
