"""The options of the recipes that train Sana, or a model beside it, on images; see `options.py`.

Nothing here imports torch.
"""

from dataclasses import dataclass

from diffusers_sana.training.config import check_exists, check_file, check_positive, option
from diffusers_sana.training.recipes.transformer_options import (
    AdapterTrainingConfig,
    CachedDataOptions,
    CaptionedDataOptions,
    ConsistencyTrainingConfig,
    PretrainedOptions,
    PromptFlowTrainingConfig,
    PromptTrainingConfig,
    QuantizableOptions,
)


CAPTION_WEIGHTINGS = ("power", "softmax")
WIRINGS = ("diffusers", "nvlabs")
PREPROCESSORS = (
    *("sobel", "hed", "hed_scribble", "pidinet", "canny", "lineart", "lineart_anime", "mlsd"),
    *("depth_midas", "depth_zoe", "normal", "openpose"),
)


@dataclass(kw_only=True)
class SanaTrainingConfig(PromptFlowTrainingConfig):
    """Training of a text-to-image transformer; defaults are the paper's where it gives any."""

    output_dir: str = option("outputs/sana", "folder for checkpoints, samples, log and result", changeable=True)
    warmup_steps: int = option(2000, "steps of linear warm-up", changeable=True)
    max_grad_norm: float = option(0.1, "clip the gradient norm; 0 does not clip", changeable=True)
    train_text_encoder: bool = option(False, "train the text encoder too; for small ones")
    sample_prompts: tuple[str, ...] = option(
        (), "prompts of the sample grids; default: those of the first batch", changeable=True
    )


@dataclass(kw_only=True)
class SanaDataOptions(CachedDataOptions):
    """Images with captions."""

    batch_size: int = option(64, "images per batch and process")
    caption_weighting: str = option(
        "power",
        "`power` (released code) or `softmax` (paper) of the CLIP scores in captions.jsonl",
        changeable=True,
        choices=CAPTION_WEIGHTINGS,
    )
    caption_temperature: float = option(0.1, "the lower, the more often the best caption is sampled", changeable=True)
    caption_threshold: float = option(25.0, "CLIP score below which captions are not sampled", changeable=True)


@dataclass(kw_only=True)
class SanaModelOptions(PretrainedOptions):
    """The models to start from."""

    transformer_config: str = option("", "config.json of a new transformer; default: the pretrained one is trained")
    sample_size: int | None = option(None, "latent side that the model is for from now on")
    interpolation_scale: int | None = option(None, "give the model a positional table: 1 at 2048 pixels, 2 at 4096")
    num_layers: int | None = option(None, "grow the transformer to this many blocks, see docs/training_options.md")
    kept_layers: int | None = option(None, "blocks that a growing transformer keeps; default: all but the last two")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_file("transformer_config", self.transformer_config)
        if self.kept_layers is not None and self.num_layers is None:
            raise ValueError(f"`kept_layers` is {self.kept_layers}, but nothing grows. Pass --num-layers too.")


@dataclass(kw_only=True)
class ControlNetTrainingConfig(PromptFlowTrainingConfig):
    """Training of a ControlNet."""

    output_dir: str = option(
        "outputs/sana-controlnet", "folder for checkpoints, samples, log and result", changeable=True
    )
    warmup_steps: int = option(500, "steps of linear warm-up", changeable=True)


@dataclass(kw_only=True)
class ControlNetDataOptions(CaptionedDataOptions):
    """Images with captions and control images."""

    control_data: str = option(
        "",
        "folder with a control image of the same name for each image; default: what `preprocessor` makes",
        changeable=True,
    )
    preprocessor: str = option(
        "sobel", "what makes the control images: `sobel` edges, or a detector of controlnet_aux", choices=PREPROCESSORS
    )


@dataclass(kw_only=True)
class ControlNetModelOptions(PretrainedOptions):
    """The pipeline to control, and the new ControlNet."""

    num_layers: int = option(7, "number of the transformer's blocks that are copied")
    wiring: str = option("diffusers", "`diffusers` or `nvlabs`, see SanaControlNetModel", choices=WIRINGS)


@dataclass(kw_only=True)
class SprintTrainingConfig(PromptTrainingConfig, ConsistencyTrainingConfig):
    """Distillation into a few-step model; defaults are the paper's where it gives any."""

    output_dir: str = option("outputs/sprint", "folder for checkpoints, samples, log and result", changeable=True)
    max_steps: int = option(20_000, "optimizer steps", changeable=True)
    learning_rate: float = option(2e-6, "peak learning rate of the student", changeable=True)
    discriminator_learning_rate: float = option(
        2e-6, "peak learning rate of the discriminator's heads", changeable=True
    )
    weight_decay: float = option(0.01, "weight decay of matrices and kernels", changeable=True)
    lora_rank: int | None = option(None, "train and save a LoRA of this rank; default: all weights of the student")
    max_grad_norm: float = option(0.1, "clip the gradient norm; 0 does not clip", changeable=True)
    tangent_warmup_steps: int = option(
        4000, "steps until the derivative along the path has its full weight", changeable=True
    )
    adversarial_weight: float = option(
        0.5, "weight of the adversarial loss; 0 leaves the discriminator out", changeable=True
    )
    max_time_share: float = option(
        0.5, "fraction of images that the discriminator sees generated from pure noise", changeable=True
    )
    discriminator_mean: float = option(
        -0.6, "as `angle_mean`, for the noise under which the discriminator sees latents", changeable=True
    )
    discriminator_std: float = option(1.0, "standard deviation of the same", changeable=True)
    discriminator_blocks: tuple[int, ...] = option(
        (), "blocks of the teacher whose features the discriminator reads; default: the paper's"
    )
    misaligned_pairs: bool = option(
        True, "show the discriminator true images with prompts of other images as fake", changeable=True
    )
    sample_prompts: tuple[str, ...] = option(
        (), "prompts of the sample grids; default: those of the first batch", changeable=True
    )


@dataclass(kw_only=True)
class SprintDataOptions(CachedDataOptions):
    """Images with captions."""

    resolution: int = option(1024, "side of the square whose area the buckets have, in pixels")


@dataclass(kw_only=True)
class ImagePromptTrainingConfig(PromptFlowTrainingConfig):
    """Training of an IP-Adapter. Samples without a caption have only the image."""

    output_dir: str = option("outputs/ip-adapter", "folder for checkpoints, samples, log and result", changeable=True)
    weight_decay: float = option(0.01, "weight decay of matrices and kernels", changeable=True)


@dataclass(kw_only=True)
class ImagePromptModelOptions(QuantizableOptions):
    """The pipeline that is to take image prompts, the image encoder, and the new adapter."""

    image_encoder: str = option("", "vision encoder of transformers, or VILA-U, folder or repository")
    image_encoder_subfolder: str = option("", "folder in it")
    features: str = option("pooled", "one vector per image, or its `patches`", choices=("pooled", "patches"))
    num_tokens: int | None = option(None, "tokens per image; default: 4 of pooled features, 16 of patches")
    token_dim: int | None = option(None, "width of the tokens; default: that of the projected text")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.image_encoder:
            raise ValueError("`image_encoder` must be a vision encoder's folder or id, got ''. Pass --image-encoder.")
        check_exists("image_encoder", self.image_encoder)
        check_positive(self, *(name for name in ("num_tokens", "token_dim") if getattr(self, name) is not None))


@dataclass(kw_only=True)
class LoraTrainingConfig(PromptFlowTrainingConfig, ConsistencyTrainingConfig, AdapterTrainingConfig):
    """Training of a LoRA; rank, layers and optimizer are those of diffusers' DreamBooth script for Sana."""

    output_dir: str = option("outputs/sana-lora", "folder for checkpoints, samples, log and result", changeable=True)
    max_steps: int = option(500, "optimizer steps", changeable=True)
    weight_decay: float = option(1e-4, "weight decay", changeable=True)
    flow_shift: float | None = option(  # type: ignore[assignment]
        None, "timestep shift; default: that of the pipeline's scheduler", changeable=True
    )
    caption_dropout: float = option(0.0, "fraction of prompts replaced by the empty prompt", changeable=True)
    sample_prompts: tuple[str, ...] = option(
        (), "prompts of the sample grids; default: those of the first batch", changeable=True
    )


@dataclass(kw_only=True)
class LoraDataOptions(CachedDataOptions):
    """Images of a thing or a style, and of its class."""

    instance_prompt: str = option("", "caption of images that have none")
    class_prompt: str = option("", "what the base model must not forget, such as `a dog`")
    class_data: str = option("", "folder of images of the class; default: in the output folder", changeable=True)
    num_class_images: int = option(100, "the base model generates what the class folder lacks of these")
    prior_weight: float = option(1.0, "weight of the loss on images of the class", changeable=True)
    cache_dir: str = option("", "folder of latents and text vectors; default: in the output folder", changeable=True)
    batch_size: int = option(4, "images per batch and process")
    num_workers: int = option(0, "processes that read the cache", changeable=True)


@dataclass(kw_only=True)
class LoraModelOptions(QuantizableOptions):
    """The pipeline to adapt."""

    pretrained: str = option("", "SanaPipeline or SanaSprintPipeline folder or repository, also a quantized one")
