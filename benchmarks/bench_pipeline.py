"""Seconds and memory of a whole picture: ours and diffusers' classes on the same folder, alternating in one process.

    python benchmarks/bench_pipeline.py [--model FOLDER] [--dtype bfloat16] [--rounds 5]

Writes `benchmarks/results/<device>/pipeline.json`.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import torch
import transformers

from diffusers_sana import SanaPipeline, __version__
from diffusers_sana.checkpoints import SANA_EMOJI


PROMPT = "a red apple on a blue background"


def device_name() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]} ({os.cpu_count()} cores)" if names else platform.machine()


def seconds(pipe: diffusers.DiffusionPipeline, size: int, steps: int) -> float:
    """One picture, from prompt to pixels."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    pipe(
        PROMPT,
        height=size,
        width=size,
        num_inference_steps=steps,
        use_resolution_binning=False,
        generator=torch.Generator("cpu").manual_seed(0),
    )
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SANA_EMOJI, help="pipeline folder; default: the bundled one")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--size", type=int, default=128, help="side of the picture in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipes = {
        "diffusers_sana": SanaPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)),
        "diffusers": diffusers.SanaPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)),
    }
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for pipe in pipes.values():
        pipe.to(device).set_progress_bar_config(disable=True)
        seconds(pipe, args.size, args.steps)
    for _ in range(args.rounds):
        for name, pipe in pipes.items():
            times[name].append(seconds(pipe, args.size, args.steps))

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    medians = {name: statistics.median(values) for name, values in times.items()}
    report = {
        "command": "python benchmarks/bench_pipeline.py " + " ".join(argv if argv is not None else sys.argv[1:]),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "commit": commit,
        "versions": {
            "diffusers_sana": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "picture": {"pixels": args.size, "steps": args.steps, "dtype": args.dtype, "rounds": args.rounds},
        "median_seconds": medians,
        "speedup": medians["diffusers"] / medians["diffusers_sana"],
        "peak_resident_mib_both": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if device == "cuda":
        report["peak_cuda_mib_both"] = torch.cuda.max_memory_allocated() / 2**20
    folder = args.results / ("cpu" if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pipeline.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
