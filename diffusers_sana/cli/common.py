"""What several commands share: arguments, and what a name stands for."""

import argparse
from pathlib import Path

from diffusers_sana.checks import check_integer


def add_device(command: argparse.ArgumentParser, dtype: str = "float32") -> None:
    """`--device` and `--dtype`."""
    command.add_argument("--device", help="default: cuda where there is one, else cpu")
    command.add_argument("--dtype", default=dtype, choices=("float32", "bfloat16", "float16"))


def check_there(name: str, place: str) -> None:
    """Raises an OSError where `place` is neither a file nor an address: what reads it would call it a bad address."""
    if not str(place).startswith(("http://", "https://", "data:")) and not Path(place).is_file():
        raise OSError(f"{name} must be a file or an address, but there is no file {place}")


def find_device(args: argparse.Namespace) -> str:
    """The device asked for, or the one there is."""
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def seed(text: str) -> int:
    """The type of `--seed`: what torch's generators take, with room for the seeds after it."""
    try:
        check_integer("--seed", value := int(text), at_least=-(2**63), at_most=2**63 - 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer of 64 bits, got {text!r}") from None
    return value
