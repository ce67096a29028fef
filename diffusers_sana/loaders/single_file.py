"""Single-file checkpoints as their authors publish them and as their trainers write them, with their own tensor names.

The names of a model are known to a function from a checkpoint to an `OfficialWeights` (see `nvlabs/`). This file has
what all models share: reading a file without running code in it, and using every tensor exactly once.
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

from diffusers_sana.checkpoint_files import HUB_ARGUMENTS, check_hub_options


# Keys under which a checkpoint may store its weights and their EMA.
WRAPPERS = {
    "model": ("generator", "state_dict", "model_state_dict", "model", "module"),  # the first is beside a critic
    "ema": ("generator_ema", "state_dict_ema", "ema", "ema_state_dict", "model_ema"),
}
MAX_DEPTH = 8  # of nested wrappers
COMFY_PREFIX = "model.diffusion_model."
# Of all keys, added by DDP, torch.compile, a list or a module around the model.
PREFIXES = ("module.", "_orig_mod.", "0.", COMFY_PREFIX, "model.")
HUB_ADDRESS = re.compile(
    r"(?:https://)?(?:huggingface\.co/|hf\.co/)?(\w[\w.-]*/\w[\w.-]*)/(?:(?:blob|resolve)/([^/]+)/)?(.+)"
)
# Trainers store NumPy's random state next to the weights: arrays of plain numbers, with their names in NumPy 1 and 2.
# None of these runs code, and object arrays are not included.
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
SINGLE_FILE_HUB_ARGUMENTS = (*HUB_ARGUMENTS, "disable_mmap")


@dataclass
class OfficialWeights:
    """How a checkpoint maps to a model.

    Attributes:
        class_name: of the model in diffusers.
        config: of the model.
        names: key in the file -> our names of the equal parts along the first axis.
        left_out: keys in the file that the model does not use.
    """

    class_name: str
    config: dict[str, Any]
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def tensors(self, checkpoint: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The state dict of `model`, as views of the tensors in the file.

        Args:
            checkpoint: the tensors by their keys in the file.
            model: built from `config`; only its shapes matter.

        Raises:
            ValueError: a tensor is missing, unexpected, or has another shape.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        out: dict[str, Tensor] = {}
        for key, names in self.names.items():
            for name, part in zip(names, _parts(key, checkpoint[key], len(names)), strict=True):
                if name not in shapes:
                    raise ValueError(
                        f"{key!r} has no place in the model: {name!r} is not there. The checkpoint is for a different "
                        "architecture."
                    )
                if name in out:
                    raise ValueError(f"{key!r} and another tensor of the file both map to {name!r}.")
                is_pointwise = tuple(part.shape) == (*shapes[name], 1, 1)  # a 1x1 convolution for a linear layer
                out[name] = part[..., 0, 0] if is_pointwise else part
                if tuple(out[name].shape) != shapes[name]:
                    raise ValueError(
                        f"{key!r} must give {name!r} of shape {list(shapes[name])} to match the other tensors, got "
                        f"{list(part.shape)}."
                    )
        missing = [name for name in shapes if name not in out]
        if missing:
            raise ValueError(
                f"the file must have a tensor for {missing[0]!r}, but lacks it and {len(missing) - 1} more. "
                "The file is incomplete, or the checkpoint is for a different architecture."
            )
        return out

    def model(self, checkpoint: Mapping[str, Tensor], model_cls: type[Any], dtype: torch.dtype | None = None) -> Any:
        """A `model_cls` in eval mode with the weights of the file; with `dtype` None they keep their dtype.

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


def required_shape(
    shapes: Mapping[str, Sequence[int]], *keys: str, rank: int | None = None, origin: str = "the file"
) -> tuple[int, ...]:
    """The shape of the first of `keys` that a checkpoint has.

    Args:
        shapes: of its tensors, by key.
        keys: names under which the tensor may be stored.
        rank: the number of axes it must have.
        origin: where the checkpoint is, for the message.

    Raises:
        ValueError: naming the tensor, if it is missing or has another number of axes.
    """
    shape = next((tuple(shapes[key]) for key in keys if key in shapes), None)
    if shape is None or rank not in (None, len(shape)):
        what = "has none" if shape is None else f"its shape is {list(shape)}"
        axes = "" if rank is None else f" with {rank} axes"
        raise ValueError(
            f"{origin} must have a tensor {keys[0]!r}{axes}, but {what}. It is incomplete, or the checkpoint is for "
            "a different architecture."
        )
    return shape


def _parts(key: str, tensor: Tensor, number: int) -> Sequence[Tensor]:
    if number > 1 and tensor.shape[0] % number:
        raise ValueError(f"{key!r} must have {number} equal parts, got {tensor.shape[0]} rows.")
    return tensor.chunk(number) if number > 1 else (tensor,)


def read_checkpoint(
    path_or_dict: str | Path | Mapping[str, Any], weights: str = "model", **hub: Any
) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` file, memory-mapped.

    Args:
        path_or_dict: a file, its address on the Hub, or the content of such a file.
        weights: "model", or "ema" for the EMA weights that a trainer stored next to them.
        hub: `SINGLE_FILE_HUB_ARGUMENTS`, for files on the Hub.

    Raises:
        ValueError: the file is damaged, lacks the requested weights, or contains anything but tensors and plain
            values; code in it is never run.
        FileNotFoundError: neither a file nor an address on the Hub.
    """
    content = path_or_dict if isinstance(path_or_dict, Mapping) else read_content(path_or_dict, **hub)
    return select_weights(content, weights)


def read_content(path_or_address: str | Path, disable_mmap: bool = False, **hub: Any) -> Any:
    """The content of a `.pth` or `.safetensors` file, memory-mapped; arguments and errors of `read_checkpoint`."""
    path = Path(path_or_address)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} must be a file, got a folder. Name the file in it.")
    if path.is_file():
        check_hub_options(path, hf_hub_download, hub)
    else:
        match = HUB_ADDRESS.fullmatch(str(path_or_address))
        if path.is_absolute() or match is None:
            raise FileNotFoundError(
                f"{str(path_or_address)!r} must be a file, or the address of one on the Hub such as "
                "'owner/name/file.pth', but no such file exists."
            )
        repo, revision, name = match.groups()
        hub = {"revision": revision, **{name: value for name, value in hub.items() if value is not None}}
        try:
            path = Path(hf_hub_download(repo, name, **hub))
        except OSError as error:
            raise FileNotFoundError(
                f"{str(path_or_address)!r} is not a local file and could not be downloaded from the Hub: "
                f"{_first_line(error)}"
            ) from error
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(path.read_bytes()) if disable_mmap else safetensors.torch.load_file(path)
        is_mapped = zipfile.is_zipfile(path) and not disable_mmap
        with torch.serialization.safe_globals(NUMPY_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:  # damaged files make the readers raise errors of any kind
        raise ValueError(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    unsafe = re.search(r"\bGLOBAL (\S+)", str(error))  # what PyTorch's own reader says
    if unsafe:
        return (
            f"{str(path)!r} must contain only tensors and plain values, but references {unsafe[1]}, which could "
            "run code. Ask for a .safetensors file, or, if you trust its author, save its weights alone in a new file."
        )
    return (
        f"{str(path)!r} must be a complete .safetensors or PyTorch .pth file, but cannot be read "
        f"({_first_line(error)}). Download or copy it again."
    )


def _first_line(error: Exception) -> str:
    # PyTorch's reader first advises to read without safety.
    return str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0] or type(error).__name__


def weight_sets(content: Any) -> list[str]:
    """Which of "model" and "ema" a file contains."""
    return [name for name in WRAPPERS if name == "model" or _nested(content, name) is not None]


def select_weights(content: Any, weights: str = "model") -> dict[str, Tensor]:
    """One set of weights from the content of a file; see `read_checkpoint`."""
    if weights not in WRAPPERS:
        raise ValueError(f"`weights` must be one of {list(WRAPPERS)}, got {weights!r}.")
    if weights == "ema":
        content = _nested(content, "ema")
        if content is None:
            raise ValueError("`weights` must be 'model' for this file, which has no EMA weights, got 'ema'.")
        if content and all(isinstance(value, Mapping) and isinstance(key, float) for key, value in content.items()):
            if len(content) > 1:  # efficientvit and DC-Gen store one set per decay
                raise ValueError(
                    f"the file has EMA weights for the decays {sorted(content)}: load the file and pass one of these "
                    "dictionaries instead of the path."
                )
            content = next(iter(content.values()))
    for _ in range(MAX_DEPTH):
        nested = _nested(content, "model")
        if nested is None:
            break
        content = nested
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"the checkpoint must be a dictionary of tensors, but is {_kind(content)}.")
    invalid = next(
        (key for key, value in content.items() if not isinstance(value, Tensor) or not isinstance(key, str)), None
    )
    if invalid is not None:
        raise ValueError(
            f"the checkpoint must be a dictionary of tensors, but {str(invalid)[:200]!r} is {_kind(content[invalid])}."
        )
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return {key.removeprefix(COMFY_PREFIX): value for key, value in content.items()}


def _nested(content: Any, weights: str) -> Mapping[Any, Any] | None:
    """The dictionary under the first key of `WRAPPERS` that exists."""
    if not isinstance(content, Mapping):
        return None
    return next((content[key] for key in WRAPPERS[weights] if isinstance(content.get(key), Mapping)), None)


def _kind(value: Any) -> str:
    return (
        "empty" if value is None or (isinstance(value, Mapping) and not value) else f"of type {type(value).__name__}"
    )


def check_config_fields(model_cls: type[Any], fields: Mapping[str, Any]) -> None:
    """Checks that all are config fields of a model.

    Raises:
        TypeError: naming one that is not.
    """
    known = set(inspect.signature(model_cls.__init__).parameters) - {"self"}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise TypeError(f"{unknown[0]!r} must be a field of {model_cls.__name__}'s config: {sorted(known)}.")
