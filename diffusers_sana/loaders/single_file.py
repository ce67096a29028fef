"""Checkpoints as the authors of a model publish them and as their trainers write them: one file, with its own names.

A model says how its authors name things with a function from a checkpoint to an `OfficialWeights`. What all models
have in common is here: reading a file without running what is in it, and taking every tensor once.
"""

import inspect
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from torch import Tensor, nn


# Where a checkpoint may hold its weights, and the running averages of them (EMA).
WRAPPERS = {
    "model": ("state_dict", "model_state_dict", "model", "module"),
    "ema": ("state_dict_ema", "ema", "ema_state_dict", "model_ema"),
}
MAX_DEPTH = 8  # of wrappers in wrappers
PREFIXES = ("module.", "_orig_mod.", "0.")  # of all keys, where DDP, torch.compile or a list held the model
COMFY_PREFIX = "model.diffusion_model."
HUB_ADDRESS = re.compile(
    r"(?:https://)?(?:huggingface\.co/|hf\.co/)?(\w[\w.-]*/\w[\w.-]*)/(?:(?:blob|resolve)/([^/]+)/)?(.+)"
)
# Trainers keep the state of NumPy's random numbers beside the weights: arrays of plain numbers, by their names in
# NumPy 1 and 2. None of these runs code, and object arrays are not among them.
NUMPY_GLOBALS: list[Any] = [
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for name, function in (
            ("_reconstruct", np.zeros(0).__reduce__()[0]),
            ("scalar", np.float64(0).__reduce__()[0]),
        )
        for core in ("core", "_core")
    ),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
]
HUB_ARGUMENTS = ("force_download", "proxies", "token", "cache_dir", "local_files_only", "revision", "disable_mmap")


@dataclass
class OfficialWeights:
    """A checkpoint, understood: what to build and what to put where.

    Attributes:
        class_name: of the model in diffusers.
        config: of the model.
        names: key in the file -> our names for the equal parts that it holds, along the first axis.
        left_out: keys in the file that the model has no use for.
    """

    class_name: str
    config: dict[str, Any]
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def tensors(self, checkpoint: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The state dict of `model`, as views of the tensors in the file.

        Args:
            checkpoint: the tensors by their keys in the file.
            model: built from `config`; its shapes are what counts.

        Raises:
            ValueError: a tensor that is missing, left over or of another shape.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        out: dict[str, Tensor] = {}
        for key, names in self.names.items():
            for name, part in zip(names, _parts(key, checkpoint[key], len(names)), strict=True):
                if name not in shapes:
                    raise ValueError(f"{key!r} has no place in the model: {name!r} is not there. It is another model.")
                if name in out:
                    raise ValueError(f"{key!r} is {name!r}, which another tensor of the file is too.")
                is_pointwise = tuple(part.shape) == (*shapes[name], 1, 1)  # a 1x1 convolution for a linear layer
                out[name] = part[..., 0, 0] if is_pointwise else part
                if tuple(out[name].shape) != shapes[name]:
                    raise ValueError(
                        f"{key!r} must make {name!r} of shape {list(shapes[name])}, by the other tensors, but makes "
                        f"{list(part.shape)}."
                    )
        missing = [name for name in shapes if name not in out]
        if missing:
            raise ValueError(
                f"the file must have a tensor for {missing[0]!r}, but has none for it and {len(missing) - 1} more. "
                "It is not whole, or of another model."
            )
        return out

    def model(self, checkpoint: Mapping[str, Tensor], model_cls: type[Any], dtype: torch.dtype | None = None) -> Any:
        """A `model_cls` in eval mode with the weights of the file; `dtype` None keeps theirs.

        Raises:
            ValueError: see `tensors`.
        """
        with init_empty_weights():
            model = model_cls.from_config(self.config)
        tensors = self.tensors(checkpoint, model)
        if dtype is not None:
            tensors = {name: part.to(dtype) if part.is_floating_point() else part for name, part in tensors.items()}
        model.load_state_dict(tensors, strict=True, assign=True)
        return model.eval()


def _parts(key: str, tensor: Tensor, number: int) -> Sequence[Tensor]:
    if number > 1 and tensor.shape[0] % number:
        raise ValueError(f"{key!r} must have {number} equal parts, but has {tensor.shape[0]} rows.")
    return tensor.chunk(number) if number > 1 else (tensor,)


def read_checkpoint(
    path_or_dict: str | Path | Mapping[str, Any], weights: str = "model", **hub: Any
) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` file. They stay on disk until somebody reads them.

    Args:
        path_or_dict: a file, an address of one on the Hub, or what is in such a file.
        weights: "model", or "ema" for the averaged weights that a trainer wrote beside them.
        hub: `HUB_ARGUMENTS`, for files on the Hub.

    Raises:
        ValueError: a file that is cut short or holds anything but tensors and plain values: code in it is never run;
            no such weights.
        FileNotFoundError: no file, and no address on the Hub.
    """
    content = path_or_dict if isinstance(path_or_dict, Mapping) else read_content(path_or_dict, **hub)
    return select_weights(content, weights)


def read_content(path_or_address: str | Path, disable_mmap: bool = False, **hub: Any) -> Any:
    """What is in a `.pth` or `.safetensors` file, mapped into memory; arguments and errors of `read_checkpoint`."""
    path = Path(path_or_address)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} must be one file, but is a folder. Name the file in it.")
    if not path.is_file():
        match = HUB_ADDRESS.fullmatch(str(path_or_address))
        if path.is_absolute() or match is None:
            raise FileNotFoundError(
                f"{str(path_or_address)!r} must be a file, or the address of one on the Hub such as "
                "'owner/name/file.pth', but there is no such file."
            )
        repo, revision, name = match.groups()
        hub = {"revision": revision, **{name: value for name, value in hub.items() if value is not None}}
        try:
            path = Path(hf_hub_download(repo, name, **hub))
        except OSError as error:
            raise FileNotFoundError(
                f"{str(path_or_address)!r} is no file here, and could not be had from the Hub: {_first_line(error)}"
            ) from error
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(path.read_bytes()) if disable_mmap else safetensors.torch.load_file(path)
        is_mapped = zipfile.is_zipfile(path) and not disable_mmap
        with torch.serialization.safe_globals(NUMPY_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise ValueError(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    unsafe = re.search(r"\bGLOBAL (\S+)", str(error))  # what PyTorch's own reader says
    if unsafe:
        return (
            f"{str(path)!r} must hold nothing but tensors and plain values, but names {unsafe[1]}, which could run "
            "code. Ask for a .safetensors file, or, if you trust who wrote it, save its weights alone in a new file."
        )
    return (
        f"{str(path)!r} must be a whole .safetensors file, or a whole .pth that PyTorch wrote, but cannot be read "
        f"({_first_line(error)}). Download or copy it again."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def weight_sets(content: Any) -> list[str]:
    """Which of "model" and "ema" a file holds, by its content."""
    return [name for name in WRAPPERS if name == "model" or _nested(content, name) is not None]


def select_weights(content: Any, weights: str = "model") -> dict[str, Tensor]:
    """One set of weights in the content of a file; see `read_checkpoint`."""
    if weights not in WRAPPERS:
        raise ValueError(f"`weights` must be one of {list(WRAPPERS)}, got {weights!r}.")
    if weights == "ema":
        content = _nested(content, "ema")
        if content is None:
            raise ValueError("`weights` must be 'model' for this file, which holds no averaged weights, got 'ema'.")
        if content and all(isinstance(value, Mapping) and isinstance(key, float) for key, value in content.items()):
            if len(content) > 1:  # efficientvit and DC-Gen write one set for each decay
                raise ValueError(
                    f"the file holds averaged weights of the decays {sorted(content)}: pass one of them, as "
                    "the dictionary in the file, in place of the path."
                )
            content = next(iter(content.values()))
    for _ in range(MAX_DEPTH):
        nested = _nested(content, "model")
        if nested is None:
            break
        content = nested
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"the checkpoint must hold tensors by their names, but is {_kind(content)}.")
    odd = next(
        (key for key, value in content.items() if not isinstance(value, Tensor) or not isinstance(key, str)), None
    )
    if odd is not None:
        raise ValueError(
            f"the checkpoint must hold tensors by their names, but {str(odd)[:200]!r} is {_kind(content[odd])}."
        )
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return {key.removeprefix(COMFY_PREFIX): value for key, value in content.items()}


def _nested(content: Any, weights: str) -> Mapping[Any, Any] | None:
    """The dictionary under the first of the names in `WRAPPERS`."""
    if not isinstance(content, Mapping):
        return None
    return next((content[key] for key in WRAPPERS[weights] if isinstance(content.get(key), Mapping)), None)


def _kind(value: Any) -> str:
    return (
        "empty" if value is None or (isinstance(value, Mapping) and not value) else f"of type {type(value).__name__}"
    )


def check_fields(model_cls: type[Any], fields: Mapping[str, Any]) -> None:
    """That all are fields of the config of a model.

    Raises:
        TypeError: naming one that is not.
    """
    known = set(inspect.signature(model_cls.__init__).parameters) - {"self"}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise TypeError(f"{unknown[0]!r} must be a field of {model_cls.__name__}'s config: {sorted(known)}.")
