"""The command line: `diffusers-sana generate "an apple on a blue background"` and the other commands.

Modules of commands import what is heavy inside `run`, after the arguments are checked: `--help` and errors of use come
at once.

Exit codes: 0; 1 for what went wrong although the command is right (network, disk, memory, damaged files); 2 for a
command that must be changed; 130 after Ctrl-C.
"""

import argparse
import os
import sys

import diffusers_sana
from diffusers_sana.arguments import ArgumentParser
from diffusers_sana.cli import again, chat, completion, convert, demo, env, evaluate, generate, quantize, verify
from diffusers_sana.cli.errors import explain
from diffusers_sana.cli.quiet import quiet


COMMANDS = {
    "generate": (generate, "generate images or videos from a prompt"),
    "again": (again, "generate an image or a video again from what it says of itself"),
    "chat": (chat, "answer a question about an image"),
    "quantize": (quantize, "save a pipeline in 4 or 8 bits"),
    "evaluate": (evaluate, "measure the quality of a model's images"),
    "verify": (verify, "compare a checkpoint's results and speed with diffusers' on this machine"),
    "convert": (convert, "convert original (NVlabs) and quantized checkpoints"),
    "demo": (demo, "serve a web page to try the models"),
    "env": (env, "show what will run on this machine, and why"),
    "completion": (completion, "print a script that completes commands and options in a shell"),
}


def parser() -> ArgumentParser:
    """All commands and their options."""
    root = ArgumentParser(prog="diffusers-sana", description="Sana, SVDQuant and VILA-U from the command line.")
    root.add_argument("--version", action="version", version=f"diffusers-sana {diffusers_sana.__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=module.run.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=command)
    return root


def main(argv: list[str] | None = None) -> None:
    """Runs a command. An error that the user can mend ends it with one line and its exit code."""
    args = parser().parse_args(argv)
    try:
        quiet()
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end(args.command, "interrupted", 130)
    except BrokenPipeError:  # the reader of the output has gone: `diffusers-sana env | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        explained = explain(error, args.command)
        if explained is None or os.environ.get("DIFFUSERS_SANA_TRACEBACK"):
            raise
        _end(args.command, *explained)


def _end(command: argparse.ArgumentParser, message: str, code: int) -> None:
    print(f"{command.prog}: {message}", file=sys.stderr)
    sys.exit(code)
