"""Runs the command line in this process."""

import contextlib
import io
from dataclasses import dataclass

from diffusers_sana.cli import main


@dataclass(frozen=True)
class Ended:
    """What a command returned and printed."""

    code: int
    out: str
    error: str


def run(*argv: str) -> Ended:
    out, error = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main(list(argv))
        except SystemExit as end:
            code = end.code or 0
    return Ended(code, out.getvalue(), error.getvalue())
