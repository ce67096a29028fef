"""Checkpoints as the authors of a model published them: one file, with names of its own.

A model says how its authors name things with a function from a checkpoint to an `OfficialWeights`. What all models
have in common is here: reading a file without running what is in it, and taking every tensor once.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from torch import Tensor, nn


WRAPPERS = ("state_dict", "model", "module")  # a checkpoint may hold its weights under one of these
COMFY_PREFIX = "model.diffusion_model."
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


def read_checkpoint(path_or_dict: str | Path | Mapping[str, Any], **hub: Any) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` file. They stay on disk until somebody reads them.

    Args:
        path_or_dict: a file, an address of one on the Hub, or what is in such a file.
        hub: `HUB_ARGUMENTS`, for files on the Hub.

    Raises:
        ValueError: a file that is cut short or holds anything but tensors: code in it is never run.
    """
    content: Any = path_or_dict
    if not isinstance(path_or_dict, Mapping):
        path = Path(path_or_dict)
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} must be one file, but is a folder. Name the file in it.")
        try:
            content = load_single_file_checkpoint(str(path_or_dict), **hub)
        except OSError as error:
            if not path.is_file():
                raise
            raise ValueError(
                f"{path} must be a whole .safetensors file, or a .pth with nothing but tensors, but is not "
                f"({_first_cause(error)}). Download it again, or save its `state_dict` alone."
            ) from error
    while nested := next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content = nested
    odd = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if odd or not content:
        raise ValueError(f"the checkpoint must hold tensors, but {odd[0]!r} is none." if odd else "it is empty.")
    return {key.removeprefix(COMFY_PREFIX): value for key, value in content.items()}


def _first_cause(error: BaseException) -> str:
    while error.__context__ is not None:
        error = error.__context__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class FromOfficialFileMixin(FromOriginalModelMixin):
    """`from_single_file` for models whose `_read_official` understands the authors' names."""

    _read_official: Callable[..., OfficialWeights]

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | Path | Mapping[str, Any] | None = None,
        config: str | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Self:
        """A model from one file in the layout of its authors, in eval mode. Needs no network for a file on disk.

        Args:
            pretrained_model_link_or_path_or_dict: a `.pth` or `.safetensors` file, its address on the Hub, or the
                tensors in it.
            config: folder or Hub id with the `config.json` of the model; by default read off the tensors.
            subfolder: of `config`.
            torch_dtype, dtype: of the weights; by default the file's.
            kwargs: fields of the config that the file does not tell or tells wrongly, and `HUB_ARGUMENTS`.

        Raises:
            ValueError: a file that is cut short or of another model, naming the tensor; a field that must be given.
            TypeError: an argument that is neither a field of the config nor for the Hub.
        """
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        check_fields(cls, kwargs)
        checkpoint = read_checkpoint(pretrained_model_link_or_path_or_dict or {}, **hub)
        if config is not None:
            hub = {name: value for name, value in hub.items() if name != "disable_mmap"}
            kwargs = {**cls.load_config(config, subfolder=subfolder, **hub), **kwargs}  # type: ignore[attr-defined]
            kwargs = {name: value for name, value in kwargs.items() if not name.startswith("_")}
        if config is not None and _has_our_names(cls, kwargs, checkpoint):
            official = OfficialWeights(cls.__name__, kwargs, {key: (key,) for key in checkpoint})
        else:
            official = cls._read_official(checkpoint, **kwargs)
        return official.model(checkpoint, cls, dtype or torch_dtype)


def _has_our_names(model_cls: type[Any], config: Mapping[str, Any], checkpoint: Mapping[str, Tensor]) -> bool:
    with init_empty_weights():
        return set(model_cls.from_config(dict(config)).state_dict()) == set(checkpoint)


def check_fields(model_cls: type[Any], fields: Mapping[str, Any]) -> None:
    """That all are fields of the config of a model.

    Raises:
        TypeError: naming one that is not.
    """
    known = set(inspect.signature(model_cls.__init__).parameters) - {"self"}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise TypeError(f"{unknown[0]!r} must be a field of {model_cls.__name__}'s config: {sorted(known)}.")
