"""Which exceptions are errors that the user can mend, in which words, and with which exit code."""

import argparse
import re

from diffusers_sana.arguments import UsageError, one_line
from diffusers_sana.checks import NotFiniteError
from diffusers_sana.files import UserError


# The command must be changed, often the name of a file.
OF_USE = (UsageError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
# The command may be right. Bugs raise these, too: DIFFUSERS_SANA_TRACEBACK=1 shows where from. Of TypeErrors only ours
# count, which name an argument in backticks.
EXPECTED = (ValueError, OSError, UserError, ImportError, MemoryError)
# Of packages that need not be imported for this, by the names that their exceptions have.
OF_PACKAGES = ("SafetensorError", "OutOfMemoryError", "DecompressionBombError", "HTTPError", "RequestException")
OUT_OF_MEMORY = "Use a smaller --height and --width, another --device or --dtype, or a quantized model"


def explain(error: Exception, command: argparse.ArgumentParser) -> tuple[str, int] | None:
    """One line for the user and the exit code; None for what only a programmer can mend."""
    message = str(error) or type(error).__name__
    is_ours = isinstance(error, TypeError) and "`" in message
    is_of_packages = any(kind.__name__ in OF_PACKAGES for kind in type(error).__mro__)
    if not (isinstance(error, EXPECTED) or is_ours or is_of_packages):
        return None
    if isinstance(error, OSError) and error.strerror:  # without "[Errno 28]"
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or "OutOfMemoryError" in type(error).__name__:
        return f"out of memory: {one_line(message, 200)} {OUT_OF_MEMORY}", 1
    named = with_options(message, command)
    names_option = isinstance(error, ValueError | TypeError) and named != message
    is_of_use = isinstance(error, OF_USE) or (names_option and not isinstance(error, NotFiniteError))
    return one_line(named).rstrip("."), 2 if is_of_use else 1


def with_options(message: str, command: argparse.ArgumentParser) -> str:
    """The message of a function, with the command's options in place of the function's arguments."""
    names = {
        action.dest: action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
        for action in command._actions
    } | {"num_inference_steps": "--steps", "num_images_per_prompt": "--num-images", "mask_image": "--mask"}
    given = {option for action in command._actions for option in action.option_strings}

    def option(match: re.Match) -> str:
        name = names.get(match[1], "")
        return name if name.isupper() or name in given else match[0]

    return re.sub(r"`(\w+)`", option, message)
