"""The command line: `diffusers-sana generate "a red apple on a blue background"` and the other commands."""

import argparse
import logging
import sys

from diffusers_sana.cli import chat, convert, demo, env, evaluate, generate, quantize
from diffusers_sana.files import InUse


COMMANDS = {
    "generate": (generate, "write a picture of a prompt"),
    "chat": (chat, "ask about a picture"),
    "quantize": (quantize, "save a pipeline in 4 bits"),
    "evaluate": (evaluate, "measure how good a model's pictures are"),
    "convert": (convert, "read the authors' files"),
    "demo": (demo, "serve a page to try it in"),
    "env": (env, "say what will run on this machine"),
}


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    root = argparse.ArgumentParser(prog="diffusers-sana", description="Sana and its relatives, from the command line.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=module.run.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return root


def main(argv: list[str] | None = None) -> None:
    """Runs a command; what a user can mend ends it with one line."""
    args = parser().parse_args(argv)
    # Imported by diffusers where it is installed, it tells everybody of kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, InUse) as error:
        sys.exit(f"diffusers-sana: {error}")
