"""The nodes as ComfyUI loads and calls them, with stubs of the few modules of ComfyUI's that they use."""

import importlib.util
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


FOLDER = Path(__file__).parents[2] / "comfyui"
PROMPT = "a fox"
SETTINGS = {"prompt": PROMPT, "steps": 2, "seed": 7}


class PreviewMethod(Enum):
    """The values of ComfyUI's `LatentPreviewMethod` that matter."""

    NoPreviews = "none"
    Latent2RGB = "latent2rgb"


class Interrupted(Exception):
    """Stands for ComfyUI's `InterruptProcessingException`."""


@dataclass
class Server:
    """What a user does to the server, and what it has shown.

    Attributes:
        models: the folder models/.
        args: options of the command line.
        updates: of progress bars: `(value, total)`, and their first total alone.
        previews: of progress bars.
        interrupt_at: the value of a bar at which the user interrupts.
    """

    models: Path
    args: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(preview_method=PreviewMethod.NoPreviews, preview_size=512)
    )
    updates: list[Any] = field(default_factory=list)
    previews: list[tuple[str, Any, int]] = field(default_factory=list)
    interrupt_at: int | None = None

    def modules(self) -> dict[str, ModuleType]:
        """ComfyUI's modules by name."""
        server = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                server.updates.append(total)

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                if value == server.interrupt_at:
                    raise Interrupted
                server.updates.append((value, total))
                if preview is not None:
                    server.previews.append(preview)

        contents = {
            "comfy": {},
            "comfy.cli_args": {"args": self.args},
            "comfy.model_management": {"get_torch_device": lambda: torch.device("cpu")},
            "comfy.utils": {"ProgressBar": ProgressBar},
            "folder_paths": {"get_folder_paths": lambda name: [str(self.models / name), str(self.models / "more")]},
        }
        modules = {name: ModuleType(name) for name in contents}
        for name, attributes in contents.items():
            vars(modules[name]).update(attributes)
            if "." in name:
                setattr(modules["comfy"], name.partition(".")[2], modules[name])
        return modules


def load_nodes(name: str) -> ModuleType:
    """By path and under any name, as ComfyUI does."""
    for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[loaded]  # those of another server
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def declared_inputs(node_class: Any) -> tuple[dict[str, Any], set[str]]:
    """Defaults by name, as ComfyUI's page fills them in, and the names of all inputs that are not optional."""
    groups = node_class.INPUT_TYPES()
    defaults: dict[str, Any] = {}
    for name, (kind, *rest) in {**groups["required"], **groups["optional"]}.items():
        if rest and "default" in rest[0]:
            defaults[name] = rest[0]["default"]
        elif isinstance(kind, list):
            defaults[name] = kind[0]
    return defaults, set(groups["required"])


def call(nodes: ModuleType, node: str, **values: Any) -> tuple[Any, ...]:
    """The outputs of a node: its function with the declared defaults and `values`, of the declared types."""
    node_class = nodes.NODE_CLASS_MAPPINGS[node]
    defaults, required = declared_inputs(node_class)
    inputs = defaults | values
    groups = node_class.INPUT_TYPES()
    assert required <= inputs.keys() <= groups["required"].keys() | groups["optional"].keys()
    with torch.inference_mode():  # as ComfyUI does
        outputs = getattr(node_class(), node_class.FUNCTION)(**inputs)
    for output, kind in zip(outputs, node_class.RETURN_TYPES, strict=True):
        if kind == "IMAGE":
            assert output.dtype == torch.float32
            assert output.device.type == "cpu"
            assert output.shape[-1] == 3
            assert 0 <= output.min() < output.max() <= 1
        elif kind == "LATENT":
            assert output["samples"].dtype == torch.float32
            assert output["samples"].ndim == 4
        elif kind == "STRING":
            assert isinstance(output, str)
    return outputs


def changed(nodes: ModuleType, node: str, **values: Any) -> Any:
    """What ComfyUI compares before it uses an earlier output of the node again."""
    node_class = nodes.NODE_CLASS_MAPPINGS[node]
    return node_class.IS_CHANGED(**declared_inputs(node_class)[0] | values)
