"""The options of the two stages of VILA-U: how they train, on which data, from which models; see `options.py`.

Nothing here imports torch.
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers_sana.training.config import (
    PERCEPTUAL,
    ImageDataOptions,
    TrainingConfig,
    check_exists,
    check_file,
    check_one_of,
    check_positive,
    check_pretrained,
    option,
)


@dataclass(kw_only=True)
class VilaUTowerTrainingConfig(TrainingConfig):
    """Training of a vision tower. The paper gives the sum of the losses only; the rest is RQ-VAE's recipe."""

    output_dir: str = option(
        "outputs/vila_u_tower", "folder for checkpoints, samples, log and result", changeable=True
    )
    learning_rate: float = option(4e-5, "peak learning rate", changeable=True)
    betas: tuple[float, float] = option((0.5, 0.9), "the optimizer's betas", changeable=True)
    reconstruction_weight: float = option(1.0, "weight of L1 and perceptual loss together", changeable=True)
    perceptual_weight: float = option(1.0, "weight of the perceptual loss beside L1; 0 leaves it out", changeable=True)
    perceptual_every: int = option(
        1, "steps between uses of the perceptual loss, its weight raised to match", changeable=True
    )
    perceptual: str = option(
        "random",
        "`random`: seeded features without a download, or `lpips`: that package's VGG",
        choices=PERCEPTUAL,
    )
    contrastive_weight: float = option(
        1.0, "weight of the contrastive loss; 0 leaves it out, and needs no text tower", changeable=True
    )
    decoder_only: bool = option(
        False, "train the pixel decoder alone; token ids do not change, so it can be done at any time"
    )
    train_text_tower: bool = option(False, "train the text tower too: for towers that begin from nothing")
    initial_count: float = option(0.0, "use counts the codebook begins with: 0 if new, 100 if trained")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrastive_weight and self.decoder_only:
            raise ValueError(
                "`contrastive_weight` must be 0 with `decoder_only`, which trains nothing that the loss could reach."
            )


@dataclass(kw_only=True)
class VilaUTowerDataOptions(ImageDataOptions):
    """Images with captions."""

    batch_size: int = option(64, "images per batch and process")


@dataclass(kw_only=True)
class VilaUTowerModelOptions:
    """The tower to start from: SigLIP, a trained tower, or a new one."""

    siglip: str = option("", "SiglipModel to begin from, a folder or repository")
    pretrained: str = option("", "VilaUVisionModel to continue from")
    model_config: str = option("", "config.json of a new VilaUVisionModel")
    tokenizer: str = option("", "of the text tower; default: that of the SiglipModel")

    def __post_init__(self) -> None:
        check_one_of(self, "siglip", "pretrained", "model_config")
        check_file("model_config", self.model_config)
        for name in ("siglip", "pretrained", "tokenizer"):
            check_exists(name, getattr(self, name))


@dataclass(kw_only=True)
class VilaUTrainingConfig(TrainingConfig):
    """Training of language model, projector and depth transformer; defaults are the paper's."""

    output_dir: str = option("outputs/vila_u", "folder for checkpoints, samples, log and result", changeable=True)
    learning_rate: float = option(5e-5, "peak learning rate; the paper's fine-tuning has 1e-4", changeable=True)
    lr_schedule: str = option("cosine", "`constant` or `cosine`, after the warm-up", changeable=True)
    caption_dropout: float = option(
        0.1, "fraction of the prompts of images that are emptied, for guidance", changeable=True
    )
    cell_dropout: float = option(
        0.0, "hide up to this fraction of an image's tokens from the language model; see docs", changeable=True
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", changeable=True
    )
    sample_prompts: tuple[str, ...] = option((), "prompts of the sample grids; none: no grids", changeable=True)
    sample_guidance: float = option(3.0, "guidance scale of the sample grids", changeable=True)


@dataclass(kw_only=True)
class VilaUDataOptions:
    """Chats to train on."""

    data: str = option("", "folder of images with chats.jsonl", changeable=True)
    allow_outside: bool = option(False, "read images outside of the data folder that its chats name", changeable=True)
    cache_codes: bool = option(True, "encode every image once, before the training", changeable=True)
    batch_size: int = option(64, "chats per batch and process")
    num_workers: int = option(4, "processes that load chats", changeable=True)

    def __post_init__(self) -> None:
        if not Path(self.data, "chats.jsonl").exists():
            raise ValueError(f"`data` must be a folder with chats.jsonl, got {self.data!r}. Check the path.")
        check_positive(self, "batch_size")


@dataclass(kw_only=True)
class VilaUModelOptions:
    """The model to start from."""

    pretrained: str = option("", "folder or repository of model and processor")

    def __post_init__(self) -> None:
        check_pretrained(self.pretrained, "a folder or repository of a VILA-U")
