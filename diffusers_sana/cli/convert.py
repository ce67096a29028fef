"""`diffusers-sana convert`: convert original (NVlabs) checkpoints to diffusers folders."""

import argparse
import json
from typing import Any

from diffusers_sana.arguments import DTYPES, check_file, check_new_folder, file_path


def _field(text: str) -> tuple[str, Any]:
    """A config field and its value, which is JSON or a word."""
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"must be a field and its value, as in sample_size=32, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument(
        "file", metavar="FILE", type=file_path, help=".pth or .safetensors of a Sana, ControlNet or DC-AE"
    )
    command.add_argument(
        "-o", "--out", type=file_path, required=True, metavar="DIR", help="new or empty folder to write"
    )
    command.add_argument("--base", metavar="PIPELINE", help="folder or Hub id with the other components")
    command.add_argument(
        "--component", choices=("transformer", "controlnet"), help="which one, of a file that has both"
    )
    command.add_argument(
        "--weights",
        choices=("model", "ema"),
        default="model",
        help="which weights of a training checkpoint: the model's or the EMA's; default: model",
    )
    command.add_argument("--dtype", choices=DTYPES, help="default: the file's")
    command.add_argument(
        "--set",
        type=_field,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="config fields that the file does not determine: sample_size=32; wiring=diffusers for a ControlNet with "
        "NVlabs names that was trained in diffusers' architecture (default: wiring=nvlabs)",
    )
    command.add_argument("--dry-run", action="store_true", help="check the file and print what would be written")


def run(args: argparse.Namespace) -> None:
    """Converts an original (NVlabs) checkpoint of Sana, its ControlNet or DC-AE to a diffusers folder."""
    check_file("FILE", args.file)
    if not args.dry_run:
        check_new_folder("--out", args.out)

    import torch

    from diffusers_sana.loaders.nvlabs.convert import convert, plan_conversion

    fields = dict(args.set)
    if args.dry_run:
        print(plan_conversion(args.file, args.component, weights=args.weights, **fields))
        return
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    plan = convert(args.file, args.out, args.base, args.component, dtype, args.weights, **fields)
    print(args.out.resolve())
    print(plan)
