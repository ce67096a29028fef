"""What the name of a model stands for: a bundled checkpoint, a folder or a Hub id, and the pipeline that loads it."""

from typing import Any

from diffusers_sana.checkpoints import BUNDLED


def checkpoint_path(model: str) -> str:
    """The folder of a bundled checkpoint, such as "sana-emoji"; any other name is returned unchanged."""
    return BUNDLED.get(model, model)


def find_pipeline_class(model: str) -> type[Any]:
    """The pipeline class for a checkpoint: of this package where it has one, else diffusers' `DiffusionPipeline`.

    Args:
        model: name of a bundled checkpoint, folder or Hub id. A transformers checkpoint without `model_index.json`
            counts as VILA-U, whose pipeline raises if it is another model.
    """
    from diffusers import DiffusionPipeline
    from transformers.utils.hub import has_file

    from diffusers_sana import SanaPipeline, SanaSprintPipeline, VilaUPipeline

    model = checkpoint_path(model)
    if has_file(model, "config.json") and not has_file(model, DiffusionPipeline.config_name):
        return VilaUPipeline
    name = DiffusionPipeline.load_config(model).get("_class_name")
    ours = (SanaPipeline, SanaSprintPipeline, VilaUPipeline)
    return next((cls for cls in ours if cls.__name__ == name), DiffusionPipeline)
