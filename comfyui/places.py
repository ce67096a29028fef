"""The drop-down lists of models, LoRAs and ControlNets, and what their entries stand for.

Lists begin with what comes with diffusers_sana, so that each node works as it is. What lies in ComfyUI's folders
follows, as `folder_paths` and the user's extra_model_paths.yaml have it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import host


ELSEWHERE = (
    "STRING",
    {"default": "", "tooltip": "a folder, a file or a Hub id that is not in the list above; empty: the list counts"},
)


@dataclass(frozen=True)
class Places:
    """One kind of model.

    Attributes:
        folder: its name in `folder_paths`, and so the folder in ComfyUI's models/.
        bundled: names of checkpoints that come with diffusers_sana.
        find: yields the paths, relative to a folder, of what is in it.
    """

    folder: str
    bundled: tuple[str, ...]
    find: Callable[[Path], Iterator[Path]]

    def names(self) -> list[str]:
        """The drop-down list."""
        return [*self.bundled, *sorted(self._found().keys() - set(self.bundled))]

    def place(self, name: str, elsewhere: str = "") -> str:
        """What a node loads: a bundled name, a path or a Hub id.

        Args:
            name: out of the list.
            elsewhere: counts in place of it unless empty.

        Raises:
            ValueError: there is nothing of this name.
        """
        if elsewhere.strip():
            return elsewhere.strip()
        if name in self.bundled:
            return name
        found = self._found()
        if name not in found:
            raise ValueError(f"there is no {name!r} in ComfyUI's models/{self.folder}. Choose one of {self.names()}.")
        return str(found[name])

    def _found(self) -> dict[str, Path]:
        """Name to path; where two folders have a name, the first counts, as in `folder_paths`."""
        roots = [] if host.folder_paths is None else host.folder_paths.get_folder_paths(self.folder)
        return {str(path): Path(root) / path for root in reversed(roots) for path in self.find(Path(root))}


def state_of(place: str) -> str:
    """A digest of a file or folder as it is now, from paths, sizes and times; of anything else, of the name."""
    path = Path(place)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()) if place else []
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr((place, states)).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def source(place: str) -> str:
    """What `from_pretrained` takes: the folder of a bundled name, or the place itself."""
    from diffusers_sana import checkpoint_path

    return checkpoint_path(place)


def _entry(file: Path, key: str) -> str:
    """One value of a JSON file; "" where there is none."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8")).get(key, ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _folders_with(file: str, key: str, values: tuple[str, ...]) -> Callable[[Path], Iterator[Path]]:
    """Finds folders with a JSON file in which `key` is one of `values`; does not look into pipelines."""

    def find(root: Path) -> Iterator[Path]:
        for folder, subfolders, files in os.walk(root, followlinks=True):
            if "model_index.json" in files:
                subfolders.clear()
            if file in files and _entry(Path(folder) / file, key) in values:
                yield Path(folder).relative_to(root)

    return find


def _files_or_folders(root: Path) -> Iterator[Path]:
    """Weight files; a folder in place of a file that lies beside its config.json."""
    for folder, _, files in os.walk(root, followlinks=True):
        for file in files:
            if Path(file).suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt"):
                yield (Path(folder) if "config.json" in files else Path(folder) / file).relative_to(root)


SANA = Places(
    "diffusers",
    ("sana-emoji", "sana-emoji-sprint"),
    _folders_with("model_index.json", "_class_name", ("SanaPipeline", "SanaSprintPipeline")),
)
VILA_U = Places("diffusers", ("vila-u-emoji",), _folders_with("config.json", "model_type", ("vila_u",)))
LORAS = Places("loras", ("sana-emoji-pixel-art",), _files_or_folders)
CONTROLNETS = Places("controlnet", ("sana-emoji-edges",), _files_or_folders)
