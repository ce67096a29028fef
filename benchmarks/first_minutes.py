"""How long a new user waits for each result, from a fresh clone and an empty directory on.

    python -m benchmarks.first_minutes

Clones this repository into a temporary folder, runs the commands of the docs there one after the other, and writes
what each took to `benchmarks/results/<device>/first_minutes.json`: the first one installs everything that they need.
The table of docs/first_minutes.md comes from there.
"""

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, environment, write_results


ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Step:
    """A result and the command that gives it.

    Attributes:
        result: what the user has afterwards.
        command: run in the clone, with the programs of its `.venv`.
        shows: a file that must be there afterwards.
    """

    result: str
    command: str
    shows: str = ""


STEPS = (
    Step("first image, with everything installed", 'make demo PROMPT="an apple on a blue background"'),
    Step("image", 'diffusers-sana generate "a fox on a green background, flat style" --out fox.png', "fox.png"),
    Step(
        "the same image, from what the file says of itself", "diffusers-sana again fox.png --out same.png", "same.png"
    ),
    Step(
        "image from an image",
        'diffusers-sana generate "a cat" --image fox.png --strength 0.8 --out cat.png',
        "cat.png",
    ),
    Step(
        "image in one step, SANA-Sprint",
        'diffusers-sana generate "a fox" --model sana-emoji-sprint --steps 1 --out sprint.png',
        "sprint.png",
    ),
    Step("answer about an image", 'diffusers-sana chat fox.png "What is this?"'),
    Step("pipeline in 4 bits", "diffusers-sana quantize sana-emoji --out four-bits", "four-bits/model_index.json"),
    Step("image in 4 bits", 'diffusers-sana generate "a fox" --model four-bits --out four.png', "four.png"),
    Step("comparison with diffusers on this machine", "diffusers-sana verify sana-emoji"),
    Step(
        "quality report",
        "diffusers-sana evaluate sana-emoji --checks scenes --limit 16 --out report",
        "report/report.md",
    ),
)


def run(step: Step, clone: Path) -> dict[str, Any]:
    """Seconds of a step, by the clock and of the processors.

    Raises:
        RuntimeError: the command failed, or its file is not there.
    """
    paths = os.pathsep.join([str(clone / ".venv" / "bin"), os.environ["PATH"]])
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        step.command, shell=True, cwd=clone, env=inherited | {"PATH": paths}, capture_output=True, text=True
    )
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode or not (clone / step.shows).exists():
        raise RuntimeError(f"`{step.command}` ended with code {ended.returncode}: {ended.stderr[-2000:]}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "result": step.result,
        "command": step.command,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "diffusers_sana"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        rows = []
        for step in STEPS:
            rows.append(run(step, clone))
            print(json.dumps(rows[-1]), flush=True)
    write_results("first_minutes", environment() | {"cores": os.cpu_count(), "steps": rows}, args.results)


if __name__ == "__main__":
    main()
