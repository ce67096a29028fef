"""The options of a class-conditional DiT on latents; see `options.py`.

Nothing here imports torch.
"""

from dataclasses import dataclass

from diffusers_sana.training.config import ImageDataOptions, check_exists, option
from diffusers_sana.training.recipes.transformer_options import FlowTrainingConfig


@dataclass(kw_only=True)
class DiTTrainingConfig(FlowTrainingConfig):
    """Training of a class-conditional DiT."""

    output_dir: str = option("outputs/dit", "folder for checkpoints, samples, log and result", changeable=True)
    ema_decay: float = option(
        0.9999, "decay of the EMA weights that are saved; 0 saves the trained weights", changeable=True
    )
    flow_shift: float = option(1.0, "timestep shift", changeable=True)
    class_dropout: float = option(0.1, "fraction of labels replaced by no class, for guidance", changeable=True)
    sample_classes: tuple[str, ...] = option(
        (), "classes of the sample grids; default: the first ones, 8 images", changeable=True
    )
    sample_guidance: float = option(4.0, "guidance scale of the sample grids", changeable=True)


@dataclass(kw_only=True)
class DiTDataOptions(ImageDataOptions):
    """Images with classes."""

    data: str = option(
        "",
        "folder with a sub-folder of images for each class; or WebDataset tars, or a dataset of the Hub, whose"
        " `caption_column` is the class",
        changeable=True,
    )
    cache_dir: str = option("", "folder of latents; default: in the output folder", changeable=True)
    batch_size: int = option(256, "images per batch and process")
    num_workers: int = option(0, "processes that read the cache", changeable=True)
    resolution: int = option(512, "side of the square images in pixels")


@dataclass(kw_only=True)
class DiTModelOptions:
    """The autoencoder, and the new transformer; by default DiT-S."""

    vae: str = option("", "AutoencoderDC or AutoencoderKL, folder or repository")
    vae_subfolder: str = option("", "folder in it, such as `vae` of a pipeline")
    patch_size: int = option(1, "side of a token in latents")
    num_layers: int = option(12, "blocks")
    num_attention_heads: int = option(6, "attention heads")
    attention_head_dim: int = option(64, "channels per head")

    def __post_init__(self) -> None:
        if not self.vae:
            raise ValueError("`vae` must be an autoencoder's folder or repository, got ''. Pass --vae.")
        check_exists("vae", self.vae)
