"""`diffusers-sana verify`: run a checkpoint with diffusers' classes and with ours, and compare."""

import argparse
import json
import shlex
import sys
from pathlib import Path

from diffusers_sana.arguments import DTYPES, TARGET_PRECISIONS, UsageError, check_writable, device, file_path, integer
from diffusers_sana.files import atomic_write
from diffusers_sana.loading import check_version, pipeline_class_name


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument(
        "model", metavar="MODEL", help="Hub id or folder of a Sana or SANA-Sprint, or a bundled checkpoint"
    )
    command.add_argument(
        "--quantize",
        nargs="?",
        const="int4",
        choices=TARGET_PRECISIONS,
        help="also compare 4 or 8 bits; default: int4",
    )
    command.add_argument(
        "--out", type=file_path, default=Path("outputs/verified.json"), metavar="FILE", help="the report to write"
    )
    command.add_argument("--prompt", default="an apple on a blue background", help="what to generate")
    command.add_argument("--num-images", type=integer(2), default=3, help="images by each, the first to warm up")
    command.add_argument("--steps", type=integer(2), help="denoising steps; default: the pipeline's")
    command.add_argument("--variant", help="of the files of a Hub repository, such as fp16")
    command.add_argument("--device", type=device, help="default: cuda if available, else cpu")
    command.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")


def run(args: argparse.Namespace) -> None:
    """Runs a checkpoint with diffusers' classes and with ours from the same seeds, and compares results and costs.

    Prints tables and writes a JSON file to attach to a report. Exits with 1 if a result is not as exact as it must be.
    """
    if args.out.is_dir():
        raise UsageError(f"--out must be a file, but {args.out} is a folder")
    check_writable("--out", args.out.parent)
    pipeline_class_name(args.model)  # an error at once if there is no such model
    check_version(args.model, None, args.variant)

    from diffusers_sana.evaluation.verification import summary, verify

    report = verify(
        args.model,
        quantize=args.quantize,
        prompt=args.prompt,
        num_images=args.num_images,
        steps=args.steps,
        device=args.device,
        dtype=args.dtype,
        variant=args.variant,
    )
    report = {"command": shlex.join(["diffusers-sana", *sys.argv[1:]]), **report}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(summary(report))
    print(args.out.resolve())
    if not all(check["passed"] for check in report["checks"]):
        sys.exit(1)
