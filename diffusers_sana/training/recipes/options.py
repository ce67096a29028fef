"""The options of each recipe: how it trains, on which data, from which models.

Of the three groups, `train` of a recipe takes the first; the other two say what `run` loads for it. Field names are
those of the settings in a run's `state.json`: renaming one would end the runs that have it.

Nothing here imports torch.
"""

from collections.abc import Sequence
from importlib import import_module

from diffusers_sana.training.config import parse_options
from diffusers_sana.training.recipes.dc_ae_dit_options import DiTDataOptions, DiTModelOptions, DiTTrainingConfig
from diffusers_sana.training.recipes.dc_ae_options import DCAEDataOptions, DCAEModelOptions, DCAETrainingConfig
from diffusers_sana.training.recipes.post_training_options import (
    DpoDataOptions,
    DpoModelOptions,
    DpoTrainingConfig,
    NftDataOptions,
    NftModelOptions,
    NftTrainingConfig,
)
from diffusers_sana.training.recipes.sana_options import (
    ControlNetDataOptions,
    ControlNetModelOptions,
    ControlNetTrainingConfig,
    ImagePromptModelOptions,
    ImagePromptTrainingConfig,
    LoraDataOptions,
    LoraModelOptions,
    LoraTrainingConfig,
    SanaDataOptions,
    SanaModelOptions,
    SanaTrainingConfig,
    SprintDataOptions,
    SprintTrainingConfig,
)
from diffusers_sana.training.recipes.sana_video_options import (
    SanaVideoDataOptions,
    SanaVideoModelOptions,
    SanaVideoTrainingConfig,
)
from diffusers_sana.training.recipes.transformer_options import CaptionedDataOptions, QuantizableOptions
from diffusers_sana.training.recipes.vila_u_options import (
    VilaUDataOptions,
    VilaUModelOptions,
    VilaUTowerDataOptions,
    VilaUTowerModelOptions,
    VilaUTowerTrainingConfig,
    VilaUTrainingConfig,
)


# Recipe -> its groups of options.
RECIPES: dict[str, tuple[type, ...]] = {
    "controlnet": (ControlNetTrainingConfig, ControlNetDataOptions, ControlNetModelOptions),
    "dc_ae": (DCAETrainingConfig, DCAEDataOptions, DCAEModelOptions),
    "dc_ae_dit": (DiTTrainingConfig, DiTDataOptions, DiTModelOptions),
    "dpo": (DpoTrainingConfig, DpoDataOptions, DpoModelOptions),
    "image_prompt": (ImagePromptTrainingConfig, CaptionedDataOptions, ImagePromptModelOptions),
    "lora": (LoraTrainingConfig, LoraDataOptions, LoraModelOptions),
    "nft": (NftTrainingConfig, NftDataOptions, NftModelOptions),
    "sana": (SanaTrainingConfig, SanaDataOptions, SanaModelOptions),
    "sana_video": (SanaVideoTrainingConfig, SanaVideoDataOptions, SanaVideoModelOptions),
    "sprint": (SprintTrainingConfig, SprintDataOptions, QuantizableOptions),
    "vila_u": (VilaUTrainingConfig, VilaUDataOptions, VilaUModelOptions),
    "vila_u_tower": (VilaUTowerTrainingConfig, VilaUTowerDataOptions, VilaUTowerModelOptions),
}


def run_recipe(name: str, arguments: Sequence[str] | None = None, description: str | None = None) -> None:
    """Read a recipe's options from the command line, then import the recipe, which imports torch, and run it.

    Args:
        name: a module of this folder.
        arguments, description: as in `parse_options`, whose errors come first.
    """
    options = parse_options(RECIPES[name], arguments, description)
    import_module(f"diffusers_sana.training.recipes.{name}").run(*options)
