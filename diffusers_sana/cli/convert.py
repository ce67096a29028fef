"""`diffusers-sana convert`: original (NVlabs) checkpoints to diffusers folders, quantized ones to other runtimes'."""

import argparse
import json
from pathlib import Path
from typing import Any

from diffusers_sana.arguments import (
    DTYPES,
    UsageError,
    check_file,
    check_new_folder,
    file_path,
    integer,
    read_prompts,
)
from diffusers_sana.loaders.quantized import TARGETS
from diffusers_sana.loading import checkpoint_path


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
        "file",
        metavar="FILE",
        type=file_path,
        help=".pth or .safetensors of Sana, SANA-Video, a ControlNet or DC-AE; with --to a quantized file, folder or "
        "Hub id",
    )
    command.add_argument(
        "-o", "--out", type=file_path, required=True, metavar="DIR", help="new or empty folder to write"
    )
    command.add_argument(
        "--base", metavar="PIPELINE", help="folder or Hub id with the other components; with --to the 16-bit model"
    )
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
    quantized = command.add_argument_group("quantized checkpoints")
    quantized.add_argument("--to", choices=TARGETS, help="the runtime whose format is written")
    quantized.add_argument(
        "--requantize", action="store_true", help="round once more what the format cannot hold; the error is printed"
    )
    quantized.add_argument("--bits", type=int, choices=(8, 4), help="of comfy-convrot; default: 8")
    quantized.add_argument("--tiled", action="store_true", help="comfy in the keys of ComfyUI's own loader")
    quantized.add_argument(
        "--prompts", type=file_path, metavar="FILE", help="for modelopt, which needs the range of each layer's input"
    )
    quantized.add_argument("--steps", type=integer(at_most=1000), help="denoising steps of these prompts")
    command.add_argument("--dry-run", action="store_true", help="check the file and print what would be written")


def run(args: argparse.Namespace) -> None:
    """Converts an original (NVlabs) checkpoint of Sana, SANA-Video, a ControlNet or DC-AE to a diffusers folder.

    With --to, converts a quantized checkpoint of any runtime to the format of another.
    """
    if args.to is not None:
        _run_quantized(args)
        return
    options = ("requantize", "bits", "tiled", "prompts", "steps")
    if given := [f"--{name}" for name in options if getattr(args, name)]:
        raise UsageError(f"{given[0]} is for quantized checkpoints: pass --to as well")
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


def _run_quantized(args: argparse.Namespace) -> None:
    """Converts a quantized checkpoint."""
    prompts = [] if args.prompts is None else read_prompts("--prompts", args.prompts)
    for name, allowed in (
        ("bits", "comfy-convrot"),
        ("tiled", "comfy"),
        ("prompts", "modelopt"),
        ("steps", "modelopt"),
    ):
        if getattr(args, name) and args.to != allowed:
            raise UsageError(f"--{name} is for --to {allowed}, got --to {args.to}")
    if args.dry_run or args.set or args.weights != "model":
        raise UsageError("--dry-run, --set and --weights are for original checkpoints, not for --to")
    check_new_folder("--out", args.out)
    place = checkpoint_path(str(args.file))
    if not Path(place).exists() and place.count("/") != 1:
        raise UsageError(f"FILE must be a file, a folder or OWNER/NAME on the Hub, but there is no {place}")

    import torch

    from diffusers_sana.loaders.quantized.hub import convert_quantized

    options = {"num_bits": args.bits} if args.bits else {}
    path = convert_quantized(
        place,
        args.out,
        args.to,
        component=args.component or "transformer",
        base=None if args.base is None else checkpoint_path(args.base),
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        prompts=prompts,
        num_inference_steps=args.steps,
        requantize=args.requantize,
        tiled=args.tiled,
        **options,
    )
    print(path.resolve())
