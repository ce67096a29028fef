"""The command line: `diffusers-sana generate "a red apple on a blue background"` and the other commands.

Modules of commands import what is heavy inside `run`, after the arguments are checked: `--help` and errors of use come
at once.
"""

import logging
import re
import sys

from diffusers_sana.arguments import ArgumentParser
from diffusers_sana.cli import chat, convert, demo, env, evaluate, generate, quantize, verify
from diffusers_sana.files import UserError


COMMANDS = {
    "generate": (generate, "generate images from a prompt"),
    "chat": (chat, "answer a question about an image"),
    "quantize": (quantize, "save a pipeline in 4 bits"),
    "evaluate": (evaluate, "measure the quality of a model's images"),
    "verify": (verify, "compare a checkpoint's results and speed with diffusers' on this machine"),
    "convert": (convert, "convert original (NVlabs) checkpoints to diffusers folders"),
    "demo": (demo, "serve a web page to try the models"),
    "env": (env, "show what will run on this machine, and why"),
}


def parser() -> ArgumentParser:
    """All commands and their options."""
    root = ArgumentParser(prog="diffusers-sana", description="Sana, SVDQuant and VILA-U from the command line.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=module.run.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=command)
    return root


def main(argv: list[str] | None = None) -> None:
    """Runs a command. Errors that the user can fix end it with one line that names the option."""
    args = parser().parse_args(argv)
    # If installed, it is imported by diffusers, and warns about kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, UserError) as error:
        sys.exit(f"diffusers-sana: {_with_options(str(error), args.command)}")


def _with_options(message: str, command: ArgumentParser) -> str:
    """The message of a function, with the command's options in place of the function's arguments."""
    options = set(re.findall(r"--[a-z-]+", command.format_help()))

    def option(match: re.Match) -> str:
        name = "--" + match[1].replace("_", "-")
        return name if name in options else match[0]

    return re.sub(r"`(\w+)`", option, message)
