"""`diffusers-sana evaluate`: measure the quality of a model's images."""

import argparse
from dataclasses import fields
from pathlib import Path

from diffusers_sana.arguments import (
    TARGET_PRECISIONS,
    UsageError,
    add_device,
    add_hub,
    check_writable,
    file_path,
    integer,
    number,
)
from diffusers_sana.evaluation.config import FEATURES, MEASURES, EvaluationConfig


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("model", metavar="MODEL", help="Hub id or folder of a pipeline, or a bundled checkpoint")
    add_hub(command)
    command.add_argument(
        "--out",
        type=file_path,
        default=Path("outputs/evaluated"),
        metavar="DIR",
        help="images, report.json, report.md; default: outputs/evaluated",
    )
    command.add_argument(
        "--checks", nargs="+", choices=MEASURES, help="what to measure; default: all that the other options allow"
    )
    command.add_argument(
        "--prompts",
        help="emoji, coco, a file of checks (docs/evaluation.md), or the questions of DPG-Bench, dpg_bench.csv; "
        "default: emoji for bundled models, else coco",
    )
    command.add_argument("--limit", type=integer(), metavar="N", help="use only N of the prompts, evenly spread")
    command.add_argument("--quantize", choices=TARGET_PRECISIONS, help="quantize the model first")
    command.add_argument("--steps", type=integer(at_most=1000), help="denoising steps; default: the pipeline's")
    command.add_argument("--guidance-scale", type=number(), help="default: the pipeline's")
    command.add_argument("--batch-size", type=integer(), default=8, help="images generated at a time; default: 8")
    against = command.add_mutually_exclusive_group()
    against.add_argument(
        "--reference-model", metavar="MODEL", help="generates the same prompts and seeds, to compare with"
    )
    against.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER|REPORT",
        help="images to compare with, or report.json of an evaluation of the same prompts, whose figures are compared",
    )
    command.add_argument("--detector", metavar="MODEL", help="object detector of transformers, for coco prompts")
    command.add_argument(
        "--threshold", type=number(0, 1), default=0.3, help="lowest score of a detected object; default: 0.3"
    )
    command.add_argument("--clip", metavar="MODEL", help="CLIP of transformers, for clip and the colors of objects")
    command.add_argument(
        "--vqa",
        metavar="MODEL",
        help="vision-language model of transformers, or module:function, for vqascore and dpg",
    )
    command.add_argument("--features", choices=FEATURES, help="for fid and kid; default: probe for emoji")
    command.add_argument("--inception", type=Path, metavar="FILE", help="weights of torch-fidelity's Inception")
    add_device(command, dtype="bfloat16")


def run(args: argparse.Namespace) -> None:
    """Generates images of fixed prompts and seeds, measures them and prints a table. If interrupted, run it again."""
    check_writable("--out", args.out)
    if args.against is not None and not args.against.exists():
        raise UsageError(f"--against must be a folder of images or a report, but there is no folder {args.against}")
    config = EvaluationConfig(**{field.name: getattr(args, field.name) for field in fields(EvaluationConfig)})

    from diffusers_sana.evaluation.report import markdown, write_report
    from diffusers_sana.evaluation.run import evaluate

    report = evaluate(config)
    path = write_report(report, config.out)
    print(markdown(report))
    print(path.resolve())
