"""`diffusers-sana again`: generate an image or a video again from what its file says of itself."""

import argparse
import logging
from pathlib import Path

from diffusers_sana.arguments import ArgumentParser, UsageError, device, file_path
from diffusers_sana.cli import generate
from diffusers_sana.cli.record import hash_inputs, read_record, versions
from diffusers_sana.files import differences


logger = logging.getLogger(__name__)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("image", metavar="IMAGE", type=file_path, help="a PNG or a video that `generate` wrote")
    command.add_argument(
        "--out", type=file_path, default=Path("outputs"), metavar="FILE|DIR", help="as in generate; default: outputs"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    command.add_argument("--device", type=device, help="default: cuda if available, else cpu")


def run(args: argparse.Namespace) -> None:
    """Generates an image or a video again from what its file says, if the files that it was made from are the same.

    Paths in it are those of the command that made it, so run it in the same folder.
    """
    record = read_record(args.image)
    parser = ArgumentParser(prog=f"{args.command.prog}, as {args.image} says")
    generate.add_arguments(parser)
    again = parser.parse_args(record["command"])
    again.out, again.overwrite, again.device = args.out, args.overwrite, args.device
    generate.check(again)
    if changed := differences(record["inputs"], hash_inputs(again)):
        raise UsageError(f"IMAGE was made from other files than are here now: {'; '.join(changed)}")
    if changed := differences(record["versions"], versions()):
        logger.warning(f"The result may differ a little, because versions do: {'; '.join(changed)}.")
    generate.run(again)
