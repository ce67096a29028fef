"""Packages that only some measures need."""

import importlib
import importlib.util
from types import ModuleType


PIP_NAMES = {"ImageReward": "image-reward", "skimage": "scikit-image", "torch_fidelity": "torch-fidelity"}


def check_installed(package: str, argument: str) -> None:
    """Raises a ValueError if a package is not installed, without importing it.

    Args:
        package: name of the module.
        argument: what needs it, for the message.
    """
    if importlib.util.find_spec(package) is None:
        raise _missing(package, argument, "leave it out")


def require(package: str, argument: str, without: str) -> ModuleType:
    """Imports a module of a package that is not among our dependencies.

    Args:
        package: name of the module.
        argument: what needs it, for the message.
        without: what to do without it, for the message.

    Raises:
        ValueError: it, or something it needs, is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise _missing(package, argument, f"{without} ({error})") from error


def _missing(package: str, argument: str, without: str) -> ValueError:
    module = package.partition(".")[0]
    return ValueError(f"{argument} needs a package: `pip install {PIP_NAMES.get(module, module)}`, or {without}")
