"""`--help` is fast, and errors of use come before anything heavy is imported. Each runs in a separate process."""

import json
import resource
import subprocess
import sys

import pytest

from diffusers_sana.checkpoints import SANA_EMOJI, VILA_U_EMOJI
from tests.two_processes import ROOT


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


def timed(*command: str):
    """A finished process, and the seconds of CPU time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def run(*arguments: str):
    """What the command line printed, and imported of `HEAVY`; and the seconds of CPU time."""
    done, seconds = timed("-c", RUN, *arguments)
    said, imported = json.loads(done.stdout.splitlines()[-1])
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
        (["generate", "a fox", "--model", VILA_U_EMOJI, "--steps", "2"], "--steps must be left out for VILA-U"),
        (["generate", "a fox", "--out", "fox.xyz"], "--out must be a folder, or end in"),
        (["generate", "a fox", "--height", "100"], "--height must be a multiple of 32, got 100. Use 96 or 128"),
        (["generate", "a fox", "--lora", "none.safetensors"], "--lora must be a file"),
        (["again", "none.png"], "IMAGE must be a file"),
        (["chat", "none.png", "what?"], "there is no file none.png"),
        (["quantize", SANA_EMOJI, "-o", "none", "--gptq"], "--gptq needs calibration data"),
        (["quantize", SANA_EMOJI, "-o", "none", "--prompts", "none.txt"], "none.txt"),
        (["quantize", SANA_EMOJI, "-o", SANA_EMOJI], "--out must be new or empty"),
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


PROMPTS = ["--prompts", "none.txt", "--out", "none"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("generate_many", [*PROMPTS], "none.txt"),
        ("generate_many", [*PROMPTS, "--batch_size", "0"], "argument --batch-size: must be at least 1, got 0"),
        ("ray_data", [*PROMPTS, "--gpus_per_actor", "-1"], "argument --gpus-per-actor: must be at least 0, got -1"),
        ("ray_serve", ["--max_queue", "0"], "argument --max-queue: must be at least 1, got 0"),
        ("ray_serve", ["--model", "no/such/folder"], "no/such/folder"),
        ("caption_images", ["--data", "none"], "--data must be a folder of images, but there is no folder none"),
        ("img2img_inpaint", ["--strength"], "unrecognized arguments: --strength"),
    ],
)
def test_errors_of_use_of_the_examples(script, arguments, message):
    if script == "ray_serve":
        pytest.importorskip("starlette")
    done, seconds = timed("-m", f"examples.{script}", *arguments)
    assert done.returncode
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 1  # the import of torch alone takes longer
