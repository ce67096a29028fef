"""Seconds and memory of a whole image: ours and diffusers' classes on the same folder, alternating in one process.

    python -m benchmarks.bench_pipeline [--model FOLDER] [--dtype bfloat16] [--rounds 5]

Writes `benchmarks/results/<device>/pipeline.json`.
"""

import argparse
import json
import resource
from pathlib import Path

import diffusers
import torch

from benchmarks.harness import RESULTS, alternate, environment, write_results
from diffusers_sana import SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI


PROMPT = "an apple on a blue background"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SANA_EMOJI, help="pipeline folder; default: the bundled one")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--size", type=int, default=256, help="side of the image in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipes = {
        "diffusers_sana": SanaPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)),
        "diffusers": diffusers.SanaPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)),
    }
    for pipe in pipes.values():
        pipe.to(device).set_progress_bar_config(disable=True)

    def generate(pipe: diffusers.DiffusionPipeline) -> None:
        pipe(
            PROMPT,
            height=args.size,
            width=args.size,
            num_inference_steps=args.steps,
            use_resolution_binning=False,
            generator=torch.Generator("cpu").manual_seed(0),
        )

    medians = alternate({name: lambda pipe=pipe: generate(pipe) for name, pipe in pipes.items()}, args.rounds)
    report = {
        **environment(),
        "image": {"pixels": args.size, "steps": args.steps, "dtype": args.dtype, "rounds": args.rounds},
        "median_seconds": medians,
        "speedup": medians["diffusers"] / medians["diffusers_sana"],
        "peak_resident_mib_both": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if device == "cuda":
        report["peak_cuda_mib_both"] = torch.cuda.max_memory_allocated() / 2**20
    write_results("pipeline", report, args.results)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
