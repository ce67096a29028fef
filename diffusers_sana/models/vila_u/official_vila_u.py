"""What AutoConfig finds for the official checkpoint of VILA-U, which no class of transformers can load."""

from typing import Any

from transformers import PreTrainedConfig


class VilaUOfficialConfig(PreTrainedConfig):
    """Says what to do with the official checkpoint.

    Raises:
        ValueError: always.
    """

    model_type = "vila_u_llama"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "VilaUOfficialConfig":
        raise ValueError(
            "this is a checkpoint in the official layout of VILA-U, with three folders of weights. Convert it once "
            "with `diffusers_sana.convert_vila_u(folder, target)` and load `target`."
        )
