"""Command lines: one style of option names, and values that are checked before anything heavy is imported.

Used by `diffusers-sana`, the training recipes and the example scripts. Importing it costs milliseconds.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from diffusers_sana.checks import LARGEST, check_integer, check_number
from diffusers_sana.files import UserError, read_lines
from diffusers_sana.loading import checkpoint_path


DTYPES = ("float32", "bfloat16", "float16")
# Of `SVDQuantConfig`. They are here because its module imports torch.
TARGET_PRECISIONS = ("int4", "nvfp4", "int8")  # to which weights can be quantized
COMPUTE_MODES = ("auto", "w4a4", "w4a8", "w4a16", "w8a8", "w8a16")
QUALITIES = ("default", "best")
ROTATIONS = ("none", "auto", "hadamard")
DEVICES = ("cpu", "cuda", "mps", "xpu")


class UsageError(ValueError):
    """A command line that must be changed. The message names the option."""


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose options are written with hyphens: `--batch-size`. Underscores, `--batch_size`, work too.

    Errors are one line, without the list of all options that argparse prints before them.
    """

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")

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


def one_line(message: str, longest: int = 600) -> str:
    """A message without line breaks, cut if it quotes a long text."""
    message = " ".join(message.split())
    return message if len(message) <= longest else f"{message[: longest - 100]} ... {message[-95:]}"


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


def file_path(text: str) -> Path:
    """The `type` of an option that takes the path of a file or folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path, got {text!r}")
    return Path(text)


def check_file(name: str, place: str | Path) -> None:
    """Raises where the argument `name` is not a file."""
    if Path(place).is_dir():
        raise UsageError(f"{name} must be a file, but {place} is a folder")
    if not Path(place).is_file():
        what = f"{place} is a device or a pipe" if Path(place).exists() else f"there is no file {place}"
        raise UsageError(f"{name} must be a file, but {what}")


def read_prompts(name: str, file: Path) -> list[str]:
    """The prompts in the text file that the argument `name` is, one per line."""
    check_file(name, file)
    try:
        prompts = [line.strip() for _, line in read_lines(file)]
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None
    if not prompts:
        raise UsageError(f"{name} must have prompts, one per line, but {file} has none")
    return prompts


def open_input(name: str, file: Path) -> Any:
    """The decoded image that the argument `name` is the file of; see `images.open_image`."""
    check_file(name, file)

    from diffusers_sana.images import open_image

    try:
        return open_image(file)
    except ValueError as error:
        raise UsageError(f"{name} {error}") from None


def check_new_folder(name: str, folder: Path) -> None:
    """Raises where the argument `name` is not the path of a folder that is new or empty and can be written."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{name} must be new or empty, got {folder}, which is not; choose another")
    check_writable(name, folder)


def check_writable(name: str, folder: Path) -> None:
    """Raises where the argument `name` is not a folder that files can be written to, nor can become one."""
    import tempfile

    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:  # such as a name that is too long
        raise UsageError(f"{name} cannot be {one_line(str(folder), 200)}: {error.strerror}") from None
    if not existing.is_dir():
        raise UsageError(f"{name} must be in a folder, but {existing} is a file")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(
            f"{name} must be in a folder that can be written to, not {existing}: {error.strerror}"
        ) from None


def add_model(parser: argparse.ArgumentParser, default: str, meaning: str) -> None:
    """`--model`, whose value becomes the folder of a bundled checkpoint or stays a folder or Hub id."""
    parser.add_argument(
        "--model", type=checkpoint_path, default=default, help=f"{meaning}; default: {default} (bundled)"
    )


def add_hub(parser: argparse.ArgumentParser) -> None:
    """`--revision` and `--variant`, which `loading.load_on` takes."""
    parser.add_argument("--revision", metavar="REF", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--variant", metavar="NAME", help="of the weights, such as fp16; default: those without a name"
    )


def add_dtype(parser: argparse.ArgumentParser, default: str | None = "float32") -> None:
    """`--dtype`; without a default it is up to the device and the checkpoint."""
    choice = default or "float32 for small models on a CPU, else the checkpoint's, or bfloat16 for its float32"
    parser.add_argument("--dtype", default=default, choices=DTYPES, help=f"default: {choice}")


def add_device(parser: argparse.ArgumentParser, dtype: str | None = "float32") -> None:
    """`--device` and `--dtype`."""
    parser.add_argument(
        "--device", type=device, help="cpu, cuda, cuda:1, mps, xpu; default: cuda if available, else cpu"
    )
    add_dtype(parser, dtype)


def device(text: str) -> str:
    """The `type` of `--device`: the name of a kind of device, perhaps with a number, as in cuda:1."""
    kind, colon, index = text.partition(":")
    if kind not in DEVICES or (colon and (kind == "cpu" or not index.isdecimal() or len(index) > 3)):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(DEVICES)}, or such as cuda:1, got {text!r}")
    return text


def find_device(name: str | None) -> str:
    """The device that `--device` names; by default the GPU, if there is one.

    Raises:
        UsageError: this machine does not have it.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return name
    backend: Any = torch.backends.mps if kind == "mps" else getattr(torch, kind)
    if not backend.is_available():
        raise UsageError(
            f"--device {name}: PyTorch {torch.__version__} finds no {kind} device here; leave --device out, or see"
            " `diffusers-sana env`"
        )
    count = 1 if kind == "mps" else backend.device_count()
    if int(index or 0) >= count:
        raise UsageError(f"--device {name}: the devices are numbered from 0, and there are {count}")
    return name


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
