"""`from_pretrained` that leaves no weight without a value and says which file is wrong.

diffusers warns where a checkpoint lacks tensors, and the model then computes with what is in memory.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from diffusers_sana.checkpoint_files import check_readable, named, read_object, read_shards, tensor_shapes


class StrictModelMixin(ModelMixin):
    """`ModelMixin` for models whose checkpoints are whole."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Self:
        """Loads a model from a folder or the Hub; all arguments are those of `ModelMixin.from_pretrained`.

        Raises:
            OSError: naming the file of a local folder that is missing, cut off or otherwise damaged.
            ValueError: naming the file for a config that cannot be meant, and for tensors that the model needs and the
                checkpoint lacks, that have another shape, or that belong to blocks which the model does not have.
        """
        if kwargs.get("use_flashpack"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        source = _Source(str(pretrained_model_name_or_path), kwargs.get("subfolder"), kwargs.get("variant"))
        default_dtype = torch.get_default_dtype()
        try:
            source.check_index()
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (ImportError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            source.explain(cls, kwargs, error)
            raise
        finally:
            torch.set_default_dtype(default_dtype)  # which diffusers changes, and leaves so after an error
        model, info = loaded
        missing, beyond = set(info["missing_keys"]), beyond_the_blocks(model, info["unexpected_keys"])
        if getattr(model, "hf_quantizer", None) is not None:
            missing = set()  # it makes tensors of others, and knows which it needs
        if kwargs.get("device_map") is None:  # which may keep weights elsewhere
            missing |= {name for name, weight in model.named_parameters() if weight.is_meta}
        check_tensors(str(source.weights), missing, beyond, info["unexpected_keys"])
        return loaded if wants_info else model


class _Source:
    """Where a model is loaded from."""

    def __init__(self, path: str, subfolder: str | None, variant: str | None) -> None:
        inner = Path(path, subfolder or "")
        self.folder = inner if inner.is_dir() else Path(path)
        stem, suffix = SAFETENSORS_WEIGHTS_NAME.rsplit(".", 1)
        between = f"{variant}." if variant else ""
        self.file = self.folder / f"{stem}.{between}{suffix}"
        self.index = self.folder / f"{SAFETENSORS_WEIGHTS_NAME}.index.{between}json"

    @property
    def weights(self) -> Path:
        """What to call the weights in a message: their file or index, or the place they came from."""
        return next((path for path in (self.index, self.file) if path.is_file()), self.folder)

    def check_index(self) -> None:
        """Raises OSError where the index of a local folder does not say what is in its files."""
        if self.index.is_file():
            read_shards(self.index)

    def explain(self, model_cls: type[Any], kwargs: dict[str, Any], error: Exception) -> None:
        """Raises, with the name of the file, if a file of a local folder is why loading ended with `error`."""
        config_file = self.folder / CONFIG_NAME
        if not config_file.is_file():
            return
        check_readable(self.folder)
        config = read_object(config_file)
        with named(config_file), init_empty_weights():
            model = model_cls.from_config(config, **{name: kwargs[name] for name in kwargs.keys() & config.keys()})
        if (quantization := config.get("quantization_config")) is not None:
            with named(config_file):
                if not isinstance(quantization, dict) or not isinstance(quantization.get("quant_method"), str):
                    raise TypeError(
                        f"`quantization_config` must be an object with `quant_method`, got {quantization!r}."
                    )
                if isinstance(error, AttributeError | KeyError | TypeError | ValueError):
                    raise error
        if quantization is not None or not self.weights.is_file():
            return
        shapes = read_shards(self.index) if self.weights == self.index else tensor_shapes(self.file)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in expected.keys() & shapes.keys():
            if expected[name] != shapes[name] and not kwargs.get("ignore_mismatched_sizes"):
                raise ValueError(
                    f"{name!r} in {self.weights} has the shape {list(shapes[name])}, but by {CONFIG_NAME} must have"
                    f" {list(expected[name])}. They are of different models."
                )
        unexpected = list(shapes.keys() - expected.keys())
        missing = expected.keys() - shapes.keys()
        check_tensors(str(self.weights), missing, beyond_the_blocks(model, unexpected), unexpected)


def check_tensors(source: str, missing: Collection[str], beyond: list[str], unexpected: list[str]) -> None:
    """Raises where a checkpoint is not whole, or not of this model.

    Args:
        source: the file, for the message.
        missing: tensors of the model that are not in the checkpoint.
        beyond: tensors of the checkpoint whose block the model does not have.
        unexpected: all tensors of the checkpoint that the model does not have.
    """
    if missing and any(".base_layer." in name for name in unexpected):
        raise ValueError(
            f"{source} was saved while a LoRA was beside the layers, which then have other names. Load it where it was"
            " made, fuse or unload the LoRA, and save the model again."
        )
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of the model, such as {sorted(missing)[0]!r}. It is not whole, or"
            f" of another model than its {CONFIG_NAME} says; download it again."
        )
    if beyond:
        raise ValueError(
            f"{source} has {len(beyond)} tensors of blocks that the model lacks, such as {sorted(beyond)[0]!r}."
            f" Its {CONFIG_NAME} must give the number of layers that the weights have. To leave blocks out, load all"
            " and delete them."
        )


def beyond_the_blocks(model: nn.Module, names: list[str]) -> list[str]:
    """Those of the tensors that belong to numbered modules of which the model has fewer."""
    return [name for name in names if _is_beyond(model, name)]


def _is_beyond(model: nn.Module, name: str) -> bool:
    module = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList | nn.Sequential) and part.isdecimal() and int(part) >= len(module):
            return True
        children = dict(module.named_children())
        if part not in children:
            return False
        module = children[part]
    return False
