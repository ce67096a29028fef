"""The folder of a quantization that is under way: what is done stays done when it is cut off.

    run.json                    what is being made, from what
    layers/NAME.safetensors     finished layers, their report in the header
    statistics/NAME.safetensors of calibration, for layers that are not finished
    model/                      being written; it is moved to its own place when it is whole

Each file is written under another name and then renamed, so that none is ever half there.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusers_sana.quantizers.svdquant.calibrate import Statistics
from diffusers_sana.quantizers.svdquant.decompose import LayerReport, QuantizedWeight


DIGESTED = 4096  # elements of each tensor that tell one model from another


class UnfinishedRun:
    """Opens the folder of a run, or begins it.

    Args:
        target: where the finished model will be; the run's own folder is beside it, with `.unfinished` at its end.
        description: what is being made, from what; of JSON's types.

    Raises:
        ValueError: a `target` with something in it, or a run of another description; says what differs.
    """

    def __init__(self, target: Path, description: dict[str, Any]) -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(
                f"`folder` must be new or empty, got {str(target)!r}, which is not. Choose another, or delete it."
            )
        self.target = target
        self.path = target.with_name(target.name + ".unfinished")
        record = self.path / "run.json"
        description = json.loads(json.dumps(description))
        if record.exists():
            if differences := _differences(json.loads(record.read_text()), description):
                raise ValueError(
                    f"{str(self.path)!r} holds an unfinished run that differs from this one in "
                    f"{'; '.join(differences)}. Call `quantize` as it was called then, or choose another `folder`, or "
                    f"delete {str(self.path)!r}."
                )
        else:
            for name in ("layers", "statistics"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            _write(record, lambda path: path.write_text(json.dumps(description, indent=2)))

    def layers(self) -> dict[str, tuple[QuantizedWeight, LayerReport]]:
        """The finished layers, on the CPU."""
        finished = {}
        for path in sorted((self.path / "layers").glob("*.safetensors")):
            tensors, metadata = _read(path)
            report = json.loads(metadata["report"])
            report["exponents"] = tuple(report["exponents"])
            finished[path.stem] = QuantizedWeight.from_tensors(tensors), LayerReport(**report)
        return finished

    def save_layer(self, name: str, weight: QuantizedWeight, report: LayerReport) -> None:
        """Keeps a finished layer."""
        tensors = {key: value.detach().cpu().contiguous() for key, value in weight.tensors().items()}
        metadata = {"report": json.dumps(report._asdict())}
        _write(self.path / "layers" / f"{name}.safetensors", lambda path: save_file(tensors, path, metadata))

    def statistics(self) -> dict[str, Path]:
        """The files of the statistics that are there, by layer."""
        return {path.stem: path for path in sorted((self.path / "statistics").glob("*.safetensors"))}

    def load_statistics(self, name: str) -> Statistics:
        """Those of a layer."""
        return Statistics(**_read(self.statistics()[name])[0])

    def save_statistics(self, name: str, statistics: Statistics) -> None:
        """Keeps the statistics of a layer."""
        path = self.path / "statistics" / f"{name}.safetensors"
        _write(path, lambda path: save_file(statistics.tensors(), path))

    def drop_statistics(self, name: str) -> None:
        """Deletes the statistics of a layer that is finished."""
        (self.path / "statistics" / f"{name}.safetensors").unlink(missing_ok=True)

    def new_model_folder(self) -> Path:
        """An empty folder to write the finished model into."""
        path = self.path / "model"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def finish(self) -> None:
        """Moves the model to its place and deletes the run."""
        if self.target.exists():
            self.target.rmdir()
        os.replace(self.path / "model", self.target)
        shutil.rmtree(self.path)


def digest(model: nn.Module) -> str:
    """A short name of a model's weights, from names, shapes and a part of the elements of all tensors."""
    result = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        result.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // DIGESTED)].cpu().contiguous()
        result.update(some.view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def _write(path: Path, write: Any) -> None:
    temporary = path.with_suffix(".tmp")
    write(temporary)
    os.replace(temporary, path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        # Copies, because memory of files is not aligned as other memory is, and products round differently there.
        return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _differences(there: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*there, *now}):
        old, new = there.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"`{prefix}{key}`: {_short(old)} there, {_short(new)} now")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
