"""`diffusers-sana quantize`: save a pipeline in 4 bits."""

import argparse
from pathlib import Path

from diffusers_sana.arguments import add_device, find_device, integer, seed
from diffusers_sana.files import read_lines
from diffusers_sana.loading import checkpoint_path, find_pipeline_class, load_on, pipeline_class_name


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("model", type=checkpoint_path, help="Hub id or folder of a pipeline, or a bundled checkpoint")
    command.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="new or empty folder to write")
    command.add_argument("--precision", default="int4", choices=("int4", "nvfp4"))
    command.add_argument("--rank", type=integer(at_least=0), default=32, help="of the low-rank branch")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="calibration prompts, one per line")
    command.add_argument("--gptq", action="store_true", help="smaller errors, slower; needs --prompts")
    command.add_argument("--components", nargs="+", default=["transformer"], help="models to quantize")
    command.add_argument("--steps", type=integer(), help="denoising steps of the calibration; default: the pipeline's")
    command.add_argument("--seed", type=seed, default=0, help="of the calibration")
    add_device(command, dtype="bfloat16")


def run(args: argparse.Namespace) -> None:
    """Saves a pipeline with its transformer in 4 bits (SVDQuant). If interrupted, run it again to continue."""
    prompts = None
    if args.prompts is not None:
        prompts = [line.strip() for _, line in read_lines(args.prompts)]
    if args.gptq and not prompts:
        raise ValueError("--gptq needs calibration data: pass --prompts FILE")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out must be new or empty, got {str(args.out)!r}, which is not; choose another")
    pipeline_class_name(args.model)  # an error at once if there is no such model

    from diffusers_sana import SVDQuantConfig
    from diffusers_sana import quantize as quantize_pipeline

    config = SVDQuantConfig(precision=args.precision, rank=args.rank, gptq=args.gptq)
    pipe = load_on(find_device(args.device), find_pipeline_class(args.model), args.model, args.dtype)
    report = quantize_pipeline(
        pipe,
        config,
        prompts=prompts,
        components=args.components,
        folder=args.out,
        num_inference_steps=args.steps,
        seed=args.seed,
    )
    print(args.out.resolve())
    print(report)
