"""Packages and weights that only some measures need."""

import importlib
from types import ModuleType


def require(package: str, argument: str, without: str) -> ModuleType:
    """Imports a package that is not among our dependencies.

    Args:
        package: name of the module, which is also what pip calls it up to the underscore.
        argument: what asked for it, for the message.
        without: what to do without it, for the message.

    Raises:
        ValueError: where it, or something it needs, is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.split(".")[0].replace("_", "-")
        raise ValueError(f"{argument} needs a package: `pip install {name}`, or {without} ({error})") from error
