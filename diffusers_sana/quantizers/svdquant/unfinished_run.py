"""The folder of a quantization in progress: finished layers survive an interruption.

    run.json                    what is quantized, and how
    layers/NAME.safetensors     finished layers, with their report in the header
    statistics/NAME.safetensors of calibration, for layers that are not finished
    model/                      the result while it is written; moved to its place when complete
    lock                        held by the process that works on it

Each file is written under another name and then renamed, so that no file is ever incomplete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusers_sana import files
from diffusers_sana.files import atomic_write, differences, locked, read_json
from diffusers_sana.quantizers.svdquant.algorithm.decompose import LayerReport
from diffusers_sana.quantizers.svdquant.algorithm.quantized_weight import QuantizedWeight
from diffusers_sana.quantizers.svdquant.calibrate import Statistics


DIGEST_ELEMENTS = 4096  # of each tensor, by which models are compared


class UnfinishedRun:
    """Opens the folder of a run, or creates it. Only one process can have it open, until `finish` or `close`.

    A context manager that closes it.

    Args:
        target: folder of the finished model; the run's folder is beside it and has the suffix `.unfinished`.
        description: what is quantized, and how; of JSON types.

    Raises:
        ValueError: a `target` that is not empty, or a run with another description; says what differs.
        RuntimeError: another process works on it.
        OSError: the folder cannot be written to.
    """

    def __init__(self, target: Path, description: dict[str, Any]) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".unfinished")
        self._lock = ExitStack()
        self._check_target()
        with self.writing():
            for name in ("layers", "statistics"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(locked(self.path / "lock", f"quantizes into {str(target)!r}"))
        try:
            self._check_target()  # again: the process that had the lock may have finished
            self._begin(json.loads(json.dumps(description)))
        except BaseException:
            self.close()
            raise

    def _check_target(self) -> None:
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise ValueError(
                f"`folder` must be new or empty, got {str(self.target)!r}, which is not. Choose another, or delete it."
            )

    def _begin(self, description: dict[str, Any]) -> None:
        record = self.path / "run.json"
        for left_by_a_kill in [*self.path.glob(".*"), *self.path.glob("*/.*.safetensors")]:
            left_by_a_kill.unlink()
        if not record.exists():
            self._write(record, lambda path: path.write_text(json.dumps(description, indent=2), encoding="utf-8"))
        elif found := differences(read_json(record), description):
            raise ValueError(
                f"{str(self.path)!r} holds an unfinished run that differs from this one in {'; '.join(found)}. Call "
                f"`quantize` as it was called then, or choose another `folder`, or delete {str(self.path)!r}."
            )

    def close(self) -> None:
        """Lets other processes work on it. The files stay."""
        self._lock.close()

    def __enter__(self) -> "UnfinishedRun":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns errors of writing, such as a full disk, into one OSError that says what to do."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{str(self.path)!r} cannot be written: {error}. What is finished there is kept: make room, load the "
                "original again, and call `quantize` with the same arguments to continue."
            ) from error

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        with self.writing(), atomic_write(path) as temporary:
            write(temporary)

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
        """Saves a finished layer."""
        tensors = {key: value.detach().cpu().contiguous() for key, value in weight.tensors().items()}
        metadata = {"report": json.dumps(report._asdict())}
        self._write(self.path / "layers" / f"{name}.safetensors", lambda path: save_file(tensors, path, metadata))

    def statistics(self) -> dict[str, Path]:
        """The files of the saved statistics, by layer."""
        return {path.stem: path for path in sorted((self.path / "statistics").glob("*.safetensors"))}

    def load_statistics(self, name: str) -> Statistics:
        """The statistics of a layer."""
        return Statistics(**_read(self.statistics()[name])[0])

    def save_statistics(self, name: str, statistics: Statistics) -> None:
        """Saves the statistics of a layer."""
        path = self.path / "statistics" / f"{name}.safetensors"
        self._write(path, lambda path: save_file(statistics.tensors(), path))

    def drop_statistics(self, name: str) -> None:
        """Deletes the statistics of a layer that is finished."""
        (self.path / "statistics" / f"{name}.safetensors").unlink(missing_ok=True)

    def new_model_folder(self) -> Path:
        """An empty folder for the finished model."""
        path = self.path / "model"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def finish(self) -> None:
        """Moves the model to its place and deletes the run's folder."""
        if self.target.exists():
            self.target.rmdir()
        os.replace(self.path / "model", self.target)
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


def settings_digest(component: Any) -> str:
    """A digest of the settings of a scheduler, a tokenizer or a model, without its weights.

    Ignores what a tokenizer keeps of its last call, and where a component was loaded from.
    """
    config: Any = getattr(component, "config", None)
    if hasattr(component, "backend_tokenizer"):
        content = json.loads(component.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    elif hasattr(component, "get_vocab"):
        content = component.get_vocab()
    else:
        content = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
        content = {key: value for key, value in content.items() if key[0] != "_" and key != "transformers_version"}
    return files.digest(json.loads(json.dumps(content, default=str)))


def digest(model: nn.Module) -> str:
    """A digest of a model's weights, from names, shapes and a part of the elements of all tensors."""
    result = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        result.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        elements = tensor.detach().flatten()[:: max(1, tensor.numel() // DIGEST_ELEMENTS)].cpu().contiguous()
        result.update(elements.view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        # Copies, because file mappings are aligned differently from other memory, which changes how products round.
        return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
