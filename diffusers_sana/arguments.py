"""Command lines: one style of option names, and values that are checked before anything heavy is imported.

Used by `diffusers-sana`, the training recipes and the example scripts. Importing it costs milliseconds.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers_sana.checks import LARGEST, check_integer, check_number
from diffusers_sana.files import UserError
from diffusers_sana.loading import checkpoint_path


DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda", "mps", "xpu")


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose options are written with hyphens: `--batch-size`. Underscores, `--batch_size`, work too."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As the base class, after the underscores in option names have become hyphens."""
        return super().parse_known_args(hyphenate(sys.argv[1:] if args is None else args), namespace)


def hyphenate(args: Sequence[str]) -> list[str]:
    """Arguments with hyphens for underscores in option names, not in values, up to `--`, which ends the options."""
    args = list(args)
    end = args.index("--") if "--" in args else len(args)
    for i, argument in enumerate(args[:end]):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            args[i] = name.replace("_", "-") + equals + value
    return args


def integer(at_least: int = 1, at_most: int = LARGEST) -> Callable[[str], int]:
    """The `type` of an option that takes an integer in a range."""
    return _type("integer", lambda text: _checked(int(text), check_integer, at_least, at_most))


def number(at_least: float = -math.inf, at_most: float = math.inf) -> Callable[[str], float]:
    """The `type` of an option that takes a finite number in a range."""
    return _type("number", lambda text: _checked(float(text), check_number, at_least, at_most))


def seed(text: str) -> int:
    """The `type` of `--seed`: what torch's generators take, with room for the seeds after it."""
    try:
        check_integer("", value := int(text), at_least=-(2**63), at_most=2**63 - 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer of 64 bits, got {text!r}") from None
    return value


def check_file(name: str, place: str | Path) -> None:
    """Raises an OSError where `place` is neither a file nor an address; what reads it would call it a bad address."""
    if not str(place).startswith(("http://", "https://", "data:")) and not Path(place).is_file():
        raise OSError(f"{name} must be a file or an address, but there is no file {place}")


def add_model(parser: argparse.ArgumentParser, default: str, meaning: str) -> None:
    """`--model`, whose value becomes the folder of a bundled checkpoint or stays a folder or Hub id."""
    parser.add_argument(
        "--model", type=checkpoint_path, default=default, help=f"{meaning}; default: {default} (bundled)"
    )


def add_dtype(parser: argparse.ArgumentParser, default: str = "float32") -> None:
    """`--dtype`."""
    parser.add_argument("--dtype", default=default, choices=DTYPES, help=f"default: {default}")


def add_device(parser: argparse.ArgumentParser, dtype: str = "float32") -> None:
    """`--device` and `--dtype`."""
    parser.add_argument("--device", type=device, help="default: cuda if available, else cpu")
    add_dtype(parser, dtype)


def device(text: str) -> str:
    """The `type` of `--device`: the name of a kind of device, perhaps with a number, as in cuda:1."""
    kind, colon, index = text.partition(":")
    if kind not in DEVICES or (colon and not index.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(DEVICES)}, or such as cuda:1, got {text!r}")
    return text


def find_device(name: str | None) -> str:
    """The device that `--device` names; by default the GPU, if there is one."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def run_script(main: Callable[[], None]) -> None:
    """Runs the `main` of a script. Errors that the user can fix end it with one line in place of a traceback."""
    try:
        main()
    except (ValueError, TypeError, OSError, UserError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def _type(name: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    parse.__name__ = name  # argparse says "invalid integer value"
    return parse


def _checked(value: Any, check: Callable[..., None], at_least: Any, at_most: Any) -> Any:
    try:
        check("value", value, at_least=at_least, at_most=at_most)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("`value` ").rstrip(".")) from None
    return value
