"""`from_single_file` for the models: the files of the models' authors are read by `diffusers_sana.loaders.nvlabs`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.loaders import FromOriginalModelMixin


class SingleFileMixin(FromOriginalModelMixin):
    """`from_single_file` of Sana, its ControlNets and DC-AE."""

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
