"""VILA-U (arXiv 2409.04429) for transformers: reads and writes text, images and videos.

The auto classes of transformers look classes up by name in this package, so names are imported on first use.
"""

from importlib import import_module
from typing import Any


_MODULES = {
    "VilaUConfig": "configuration",
    "VilaUDepthConfig": "configuration",
    "VilaUForConditionalGeneration": "modeling",
    "VilaUImageProcessor": "image_processing",
    "VilaUModel": "modeling",
    "VilaUOfficialConfig": "configuration",
    "VilaUProcessor": "processing",
    "VilaUVisionConfig": "configuration",
    "VilaUVisionModel": "vision",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}_vila_u"), name)
