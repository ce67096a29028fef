"""`diffusers-sana quantize`: save a pipeline in 4 or 8 bits."""

import argparse

from diffusers_sana.arguments import (
    COMPUTE_MODES,
    QUALITIES,
    ROTATIONS,
    TARGET_PRECISIONS,
    UsageError,
    add_device,
    add_hub,
    check_new_folder,
    file_path,
    find_device,
    integer,
    read_prompts,
    seed,
)
from diffusers_sana.loading import checkpoint_path, find_pipeline_class, load_on, pipeline_class_name, read_config


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument(
        "model", metavar="MODEL", type=checkpoint_path, help="Hub id or folder of a pipeline, or a bundled checkpoint"
    )
    command.add_argument(
        "-o", "--out", type=file_path, required=True, metavar="DIR", help="new or empty folder to write"
    )
    command.add_argument("--precision", default="int4", choices=TARGET_PRECISIONS, help="default: int4")
    command.add_argument(
        "--rank", type=integer(at_least=0), help="of the low-rank branch, 0 for none; default: 32, 0 for int8"
    )
    command.add_argument(
        "--budget", metavar="SHARE", help="of the bytes in bf16, such as 0.30x: chooses the rank of each layer"
    )
    command.add_argument("--prompts", type=file_path, metavar="FILE", help="calibration prompts, one per line")
    command.add_argument(
        "--quality", default="default", choices=QUALITIES, help="best: smaller errors, several times slower"
    )
    command.add_argument(
        "--gptq", action="store_true", help="error compensation where it lowers the error; needs --prompts"
    )
    command.add_argument(
        "--rotation",
        choices=ROTATIONS,
        help="round in a rotated basis; auto: where it lowers the error; default: none, auto for --quality best",
    )
    command.add_argument(
        "--compute-mode",
        default="auto",
        choices=COMPUTE_MODES,
        help="the mode in which the layers will compute, and for which they are fitted; default: auto",
    )
    command.add_argument(
        "--components", nargs="+", help="models to quantize; default: transformer, or model for a VILA-U"
    )
    command.add_argument(
        "--steps", type=integer(at_most=1000), help="denoising steps of the calibration; default: the pipeline's"
    )
    command.add_argument("--seed", type=seed, default=0, help="of the calibration; default: 0")
    add_hub(command)
    add_device(command, dtype="bfloat16")


def run(args: argparse.Namespace) -> None:
    """Saves a pipeline with its transformer in 4 or 8 bits (SVDQuant). If interrupted, run it again to continue."""
    prompts = None if args.prompts is None else read_prompts("--prompts", args.prompts)
    if args.gptq and not prompts:
        raise UsageError("--gptq needs calibration data: pass --prompts FILE")
    check_new_folder("--out", args.out)
    name = pipeline_class_name(args.model, args.revision)
    components = args.components or ["model" if name == "VilaUPipeline" else "transformer"]
    index = read_config(args.model, "model_index.json", args.revision) or {}
    known = [part for part, value in index.items() if isinstance(value, list) and value[0] is not None]
    if unknown := [part for part in components if index and part not in known]:
        raise UsageError(f"--components must be of {', '.join(known)}, got {', '.join(unknown)}")

    from diffusers_sana import SVDQuantConfig
    from diffusers_sana import quantize as quantize_pipeline

    config = SVDQuantConfig(
        precision=args.precision,
        rank=args.rank,
        quality=args.quality,
        gptq=args.gptq or None,
        rotation=args.rotation,
        budget=args.budget,
        compute_mode=args.compute_mode,
    )
    device = find_device(args.device)
    hub = {"revision": args.revision, "variant": args.variant}
    pipe = load_on(device, find_pipeline_class(args.model, args.revision), args.model, args.dtype, **hub)
    report = quantize_pipeline(
        pipe,
        config,
        prompts=prompts,
        components=components,
        folder=args.out,
        num_inference_steps=args.steps,
        seed=args.seed,
    )
    print(args.out.resolve())
    print(report)
