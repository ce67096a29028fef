"""How models are loaded and saved: `from_pretrained` that checks its files, `from_single_file`, `save_pretrained`.

diffusers warns where a checkpoint lacks tensors, and the model then computes with uninitialized memory. Here that is
an error, which names the file. It saves layers with adapters under names that it cannot load: an error here, too.
"""

import os
from collections.abc import Collection, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from diffusers.loaders import FromOriginalModelMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from diffusers_sana._compat import warn_if_untested
from diffusers_sana.checkpoint_files import check_readable, named, read_object, read_shards, tensor_shapes
from diffusers_sana.saving import check_saveable


warn_if_untested("accelerate")


class StrictModelMixin(ModelMixin):
    """`ModelMixin` whose `from_pretrained` requires complete checkpoints."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Self:
        """Loads a model from a folder or the Hub; all arguments are those of `ModelMixin.from_pretrained`.

        Raises:
            OSError: naming the file of a local folder that is missing, cut off or otherwise damaged.
            ValueError: naming the file, for an invalid config, and for tensors that are missing, have another shape,
                or belong to blocks that the model does not have.
        """
        if kwargs.get("use_flashpack"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return_info = kwargs.pop("output_loading_info", False)
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
            torch.set_default_dtype(default_dtype)  # diffusers changes it, and does not restore it after an error
        model, info = loaded
        missing, beyond = set(info["missing_keys"]), tensors_of_missing_blocks(model, info["unexpected_keys"])
        if getattr(model, "hf_quantizer", None) is not None:
            missing = set()  # it derives tensors from others, and knows which it needs
        if kwargs.get("device_map") is None:  # which may keep weights elsewhere
            missing |= {name for name, weight in model.named_parameters() if weight.is_meta}
        check_tensors(str(source.weights), missing, beyond, info["unexpected_keys"])
        return loaded if return_info else model

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look at the signature for what they may pass
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes a folder; the arguments are those of diffusers.

        Raises:
            ValueError: adapters are beside the layers. Nothing is written then.
        """
        check_saveable(self, type(self).__name__)
        super().save_pretrained(save_directory, *args, **kwargs)


class SingleFileMixin(FromOriginalModelMixin):
    """`from_single_file` of Sana, SANA-Video, ControlNets and DC-AE."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | Path | Mapping[str, Any] | None = None,
        config: str | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        weights: str = "model",
        **kwargs: Any,
    ) -> Self:
        """Loads a model in eval mode from one original (NVlabs) file. A local file needs no network.

        Args:
            pretrained_model_link_or_path_or_dict: a `.pth` or `.safetensors` file, its address on the Hub, or the
                tensors in it.
            config: folder or Hub id with the `config.json` of the model; by default it is derived from the tensors.
            subfolder: of `config`.
            torch_dtype, dtype: of the weights; by default the file's.
            weights: "model", or "ema" for the EMA weights that the original trainers store beside them.
            kwargs: config fields that the file does not state or states wrongly, and arguments for the Hub.

        Raises:
            ValueError: the file is damaged or belongs to another architecture (the tensor is named), or a required
                field is missing.
            TypeError: an argument that is neither a config field nor one for the Hub.
        """
        from diffusers_sana.loaders.nvlabs.load import load_single_file

        source = pretrained_model_link_or_path_or_dict
        return load_single_file(cls, source, config, subfolder, dtype or torch_dtype, weights, **kwargs)


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
        """The weights in messages: their file or index, or the folder they came from."""
        return next((path for path in (self.index, self.file) if path.is_file()), self.folder)

    def check_index(self) -> None:
        """Raises OSError if the index of a local folder does not match its files."""
        if self.index.is_file():
            read_shards(self.index)

    def explain(self, model_cls: type[Any], kwargs: dict[str, Any], error: Exception) -> None:
        """Raises an error that names the file, if a file of a local folder is the reason for `error`."""
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
                    f"{name!r} in {self.weights} must have the shape {list(expected[name])} according to "
                    f"{CONFIG_NAME}, got {list(shapes[name])}. Weights and config belong to different models."
                )
        unexpected = list(shapes.keys() - expected.keys())
        missing = expected.keys() - shapes.keys()
        check_tensors(str(self.weights), missing, tensors_of_missing_blocks(model, unexpected), unexpected)


def check_tensors(source: str, missing: Collection[str], beyond: list[str], unexpected: list[str]) -> None:
    """Raises if a checkpoint is incomplete or belongs to another model.

    Args:
        source: the file, for the message.
        missing: tensors of the model that are not in the checkpoint.
        beyond: tensors of the checkpoint that belong to blocks beyond those of the model.
        unexpected: all tensors of the checkpoint that the model does not have.
    """
    if missing and any(".base_layer." in name for name in unexpected):
        raise ValueError(
            f"{source} was saved with a LoRA attached, which renames the layers. Load it where it was made, fuse or"
            " unload the LoRA, and save the model again."
        )
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of the model, such as {sorted(missing)[0]!r}. The file is"
            f" incomplete, or for a different architecture than {CONFIG_NAME} states; download it again."
        )
    if beyond:
        raise ValueError(
            f"{source} has {len(beyond)} tensors of blocks that the model lacks, such as {sorted(beyond)[0]!r}."
            f" Its {CONFIG_NAME} must state the number of layers of the weights. To drop blocks, load all of them"
            " and delete some."
        )


def tensors_of_missing_blocks(model: nn.Module, names: list[str]) -> list[str]:
    """The names that belong to numbered modules beyond those of the model."""
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
