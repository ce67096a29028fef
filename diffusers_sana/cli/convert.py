"""`diffusers-sana convert`: read the authors' files."""

import argparse
import json
from pathlib import Path
from typing import Any

from diffusers_sana.cli.common import check_there


def _field(text: str) -> tuple[str, Any]:
    """A field of a config and its value: JSON, or a word."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("file", type=Path, help=".pth or .safetensors of Sana, a ControlNet or DC-AE")
    command.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="new or empty folder to write")
    command.add_argument(
        "--base", metavar="PIPELINE", help="folder or Hub id that gives the other parts of a pipeline"
    )
    command.add_argument("--component", choices=("transformer", "controlnet"), help="of a file that has both")
    command.add_argument(
        "--weights",
        choices=("model", "ema"),
        default="model",
        help="of a file that a trainer wrote: the model's or the averaged ones; default: model",
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the file's")
    command.add_argument(
        "--set",
        type=_field,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of the config, where the file does not tell: sample_size=32; wiring=diffusers for a ControlNet of the "
        "authors' names that was trained in that wiring (default: nvlabs, as the authors')",
    )
    command.add_argument("--dry-run", action="store_true", help="check the file and say what would be written")


def run(args: argparse.Namespace) -> None:
    """Writes the authors' file of Sana, its ControlNet or DC-AE as a folder of diffusers."""
    import torch

    from diffusers_sana.loaders.nvlabs.convert import convert, plan_conversion

    check_there("FILE", args.file)
    fields = dict(args.set)
    if args.dry_run:
        print(plan_conversion(args.file, args.component, weights=args.weights, **fields))
        return
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    plan = convert(args.file, args.out, args.base, args.component, dtype, args.weights, **fields)
    print(args.out.resolve())
    print(plan)
