"""The options of each recipe: how it trains, on which data, from which models.

Of the three groups, `train` of a recipe takes the first; the other two say what `run` loads for it. Field names are
those of the settings in a run's `state.json`: renaming one would end the runs that have it.

Nothing here imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from diffusers_sana.training.config import (
    ImageDataOptions,
    Options,
    TrainingConfig,
    check_exists,
    check_file,
    check_one_of,
    check_positive,
    check_pretrained,
    option,
    parse_options,
)
from diffusers_sana.training.recipes.dc_ae_options import DCAEDataOptions, DCAEModelOptions, DCAETrainingConfig
from diffusers_sana.training.recipes.vila_u_options import (
    VilaUDataOptions,
    VilaUModelOptions,
    VilaUTowerDataOptions,
    VilaUTowerModelOptions,
    VilaUTowerTrainingConfig,
    VilaUTrainingConfig,
)


CAPTION_WEIGHTINGS = ("power", "softmax")
WIRINGS = ("diffusers", "nvlabs")
LOSS_WEIGHTINGS = ("none", "min_snr", "cosmap")
BUCKETS = ("pipelines", "authors")
PREPROCESSORS = (
    *("sobel", "hed", "hed_scribble", "pidinet", "canny", "lineart", "lineart_anime", "mlsd"),
    *("depth_midas", "depth_zoe", "normal", "openpose"),
)
QUANTIZED = ("no", "int4", "nvfp4", "int8")
JUDGES = ("clip", "hpsv2", "imagereward", "pickscore", "scenes", "vqascore")


@dataclass(kw_only=True)
class TransformerTrainingConfig(TrainingConfig):
    """Settings of a diffusion transformer's training."""

    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", changeable=True
    )
    sample_guidance: float = option(4.5, "guidance scale of the sample grids", changeable=True)


@dataclass(kw_only=True)
class FlowTrainingConfig(TransformerTrainingConfig):
    """Settings of a training by flow matching."""

    flow_shift: float = option(3.0, "timestep shift; 6 for 4096 pixels", changeable=True)
    logit_mean: float = option(0.0, "mean of the logit-normal sigmas before the shift", changeable=True)
    logit_std: float = option(1.0, "standard deviation of the logit-normal sigmas before the shift", changeable=True)
    loss_weighting: str = option(
        "none",
        "weights of noise levels in the loss: `none`, `min_snr` or `cosmap`",
        changeable=True,
        choices=LOSS_WEIGHTINGS,
    )
    snr_gamma: float = option(5.0, "largest signal-to-noise ratio that `min_snr` counts", changeable=True)
    sample_steps: int = option(20, "Euler steps of the sample grids", changeable=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snr_gamma <= 0:
            raise ValueError(f"`snr_gamma` must be above 0, got {self.snr_gamma}. 5 is usual.")


@dataclass(kw_only=True)
class PromptTrainingConfig(TransformerTrainingConfig):
    """Settings of a training on prompts."""

    max_sequence_length: int = option(300, "largest number of text vectors that the transformer sees")
    use_instruction: bool = option(True, "put the complex human instruction before prompts, as the pipeline does")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "max_sequence_length")


@dataclass(kw_only=True)
class PromptFlowTrainingConfig(FlowTrainingConfig, PromptTrainingConfig):
    """Settings of a training by flow matching on prompts."""

    caption_dropout: float = option(
        0.1, "fraction of prompts replaced by the empty prompt, for guidance", changeable=True
    )


@dataclass(kw_only=True)
class CaptionedDataOptions(ImageDataOptions):
    """Images with captions."""

    resolution: int = option(512, "side of the square whose area the buckets have, in pixels")
    more_resolutions: tuple[int, ...] = option(
        (), "train each image at these resolutions too; a batch has one size of one of them"
    )
    buckets: str = option(
        "pipelines",
        "shapes of the buckets: those that the `pipelines` round to, or the 40 of the `authors`' training",
        choices=BUCKETS,
    )


@dataclass(kw_only=True)
class CachedDataOptions(CaptionedDataOptions):
    """Images with captions."""

    cache_dir: str = option("", "folder to keep latents and text vectors in", changeable=True)


@dataclass(kw_only=True)
class PretrainedOptions(Options):
    """The pipeline to start from."""

    pretrained: str = option("", "SanaPipeline folder or repository that provides the models")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pretrained(self.pretrained)


# Sana


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


# ControlNet


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


# SANA-Sprint


@dataclass(kw_only=True)
class ConsistencyTrainingConfig(TransformerTrainingConfig):
    """Settings of a training of SANA-Sprint by consistency; defaults are the paper's."""

    angle_mean: float = option(
        0.0, "mean of the log of the noise-to-data ratio at the training angles of a Sprint", changeable=True
    )
    angle_std: float = option(1.6, "standard deviation of the same", changeable=True)
    sigma_data: float = option(0.5, "TrigFlow's standard deviation of latents, also of the saved scheduler")
    tangent_constant: float = option(0.1, "added to the norm that a Sprint's tangents are divided by", changeable=True)
    guidance_scales: tuple[float, ...] = option(
        (4.0, 4.5, 5.0), "guidance scales that a Sprint learns", changeable=True
    )


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
class QuantizableOptions(PretrainedOptions):
    """The pipeline to start from, and the bits of the base that a LoRA trains beside."""

    quantize: str = option("no", "`no`, or `int4`, `nvfp4` or `int8`: quantize the base first", choices=QUANTIZED)
    quantize_rank: int = option(32, "rank of the low-rank branch beside the quantized weights")


@dataclass(kw_only=True)
class ImagePromptTrainingConfig(PromptFlowTrainingConfig):
    """Training of an IP-Adapter. Rows without a caption are those in which the image says everything."""

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


# LoRA


@dataclass(kw_only=True)
class AdapterTrainingConfig(TransformerTrainingConfig):
    """Settings of the training of an adapter; its defaults are those of diffusers' DreamBooth script for Sana."""

    rank: int = option(4, "rank of the adapter's matrices")
    lora_alpha: int | None = option(None, "the adapter is scaled by lora_alpha / rank; default: the rank")
    lora_dropout: float = option(0.0, "fraction of the adapter's inputs that is dropped", changeable=True)
    target_modules: tuple[str, ...] = option(
        ("to_q", "to_k", "to_v"), "layers that get an adapter, by the ends of their names"
    )
    mix_ffn: bool = option(False, "also the 1x1 convolutions of the Mix-FFN: conv_inverted, conv_point")
    use_dora: bool = option(False, "learn the magnitude of each weight separately (arXiv 2402.09353)")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(rank), for large ranks (arXiv 2312.03732)")
    rank_pattern: tuple[str, ...] = option(
        (), "other ranks of some layers, such as `attn2.to_k=8`, by the ends of their names or regular expressions"
    )
    alpha_pattern: tuple[str, ...] = option(
        (), "other alphas of some layers; default: that of all, or with it also left out their rank"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {self.rank}. 4 to 32 are usual.")
        for name in ("rank_pattern", "alpha_pattern"):
            parse_pattern(name, getattr(self, name))


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


def parse_pattern(argument: str, items: Sequence[str]) -> dict[str, int]:
    """What `--rank-pattern attn2.to_k=8` says: `{"attn2.to_k": 8}`.

    Raises:
        ValueError: an item is not of that form, or its number is below 1.
    """
    pattern = {}
    for item in items:
        name, _, value = item.rpartition("=")
        if not name or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"`{argument}` must be of items LAYER=NUMBER, got {item!r}. Write such as attn2.to_k=8.")
        pattern[name] = int(value)
    return pattern


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


# SANA-Video


@dataclass(kw_only=True)
class SanaVideoTrainingConfig(PromptFlowTrainingConfig, AdapterTrainingConfig):
    """Training of a text-to-video transformer, or of a LoRA for one."""

    output_dir: str = option("outputs/sana-video", "folder for checkpoints, samples, log and result", changeable=True)
    max_grad_norm: float = option(0.1, "clip the gradient norm; 0 does not clip", changeable=True)
    flow_shift: float = option(3.0, "timestep shift; 3 is the authors', also where videos are sampled with 8", True)
    sample_guidance: float = option(6.0, "guidance scale of the sample grids", changeable=True)
    lora: bool = option(False, "train and save a LoRA; default: all weights")
    train_text_encoder: bool = option(False, "train the text encoder too; for small ones")
    causal: bool = option(False, "train chunk by chunk, each after the clean ones before it, for LongSANA")
    chunk_frames: int = option(10, "latent frames of a chunk; the first one also has those that are over")
    sample_prompts: tuple[str, ...] = option(
        (), "prompts of the sample grids; default: those of the first batch", changeable=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "chunk_frames")
        if self.lora and self.train_text_encoder:
            raise ValueError("`train_text_encoder` must be left out with `lora`, which is for the transformer alone.")


@dataclass(kw_only=True)
class SanaVideoDataOptions(ImageDataOptions):
    """Videos and images with captions."""

    data: str = option("", "folder of videos and images", changeable=True)
    image_data: str = option(
        "", "further images: a folder, WebDataset tars or the name of a dataset of the Hub", changeable=True
    )
    frames: tuple[int, ...] = option((81,), "frames of a clip; of several numbers the largest that a video has")
    fps: float = option(16.0, "frames per second that videos are sampled at; 0 takes all frames as they are")
    clips: int = option(1, "most clips of a video, spread evenly over it; a single one is from its middle")
    resolution: int | None = option(
        None, "side of the square whose area the buckets have, in pixels; default: the trained sizes of the model"
    )
    cache_dir: str = option("", "folder of latents and text vectors; default: in the output folder", changeable=True)
    batch_size: int = option(4, "videos per batch and process")
    num_workers: int = option(0, "processes that read the cache", changeable=True)

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("`data` must be a folder of videos and images, got ''. Pass --data.")
        super().__post_init__()
        check_positive(self, "clips")
        if not self.frames or min(self.frames) < 1:
            raise ValueError(f"`frames` must be numbers of at least 1, got {self.frames}. 81 are five seconds.")
        if self.fps < 0:
            raise ValueError(f"`fps` must be at least 0, got {self.fps:g}.")


@dataclass(kw_only=True)
class SanaVideoModelOptions(QuantizableOptions):
    """The pipeline to start from, and of a LoRA the bits of the base."""

    pretrained: str = option("", "SanaVideoPipeline folder or repository; a SanaPipeline's weights begin as one")


# Post-training


@dataclass(kw_only=True)
class NftTrainingConfig(FlowTrainingConfig, PromptTrainingConfig, AdapterTrainingConfig):
    """Training of a LoRA by rewards, with DiffusionNFT; defaults are its authors' where they give any."""

    output_dir: str = option("outputs/sana-nft", "folder for checkpoints, samples, log and result", changeable=True)
    max_steps: int = option(1000, "optimizer steps", changeable=True)
    learning_rate: float = option(3e-4, "peak learning rate", changeable=True)
    weight_decay: float = option(1e-4, "weight decay", changeable=True)
    rank: int = option(32, "rank of the adapter's matrices")
    lora_alpha: int | None = option(64, "the adapter is scaled by lora_alpha / rank")
    flow_shift: float | None = option(  # type: ignore[assignment]
        None, "timestep shift; default: that of the pipeline's scheduler", changeable=True
    )
    group_size: int = option(24, "images per prompt that are generated and compared", changeable=True)
    kept_per_group: int | None = option(
        None, "train on this many of a group, half of them the best, half the worst; default: all", changeable=True
    )
    rollout_steps: int = option(10, "Euler steps of the images that are compared", changeable=True)
    rollout_guidance: float = option(1.0, "guidance scale of these images; 1 is without", changeable=True)
    levels_per_image: int = option(4, "noise levels at which an image is trained on per step", changeable=True)
    chunk_size: int = option(8, "images that pass through the models at a time", changeable=True)
    nft_beta: float = option(
        1.0, "how far the implicit policies are from the old one; smaller: stronger", changeable=True
    )
    kl_weight: float = option(1e-4, "weight of the squared distance from the base's velocity", changeable=True)
    advantage_clip: float = option(5.0, "standard deviations at which rewards are clipped", changeable=True)
    advantage_std: str = option(
        "batch", "rewards are divided by the deviation of a `batch` or `group`", True, ("batch", "group")
    )
    old_decay_rate: float = option(0.001, "growth per step of the decay of the sampling policy's EMA", changeable=True)
    old_decay_max: float = option(0.5, "largest decay of it", changeable=True)
    sample_guidance: float = option(1.0, "guidance scale of the sample grids", changeable=True)
    sample_prompts: tuple[str, ...] = option(
        (), "prompts of the sample grids; default: those of the first batch", changeable=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "rollout_steps", "levels_per_image", "chunk_size")
        if self.group_size < 2:
            raise ValueError(f"`group_size` must be at least 2, to compare images, got {self.group_size}.")
        kept = self.kept_per_group
        if kept is not None and (kept < 2 or kept % 2 or kept > self.group_size):
            raise ValueError(f"`kept_per_group` must be even, from 2 to `group_size` {self.group_size}, got {kept}.")
        for name in ("nft_beta", "advantage_clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        if not 0 <= self.old_decay_max < 1 or self.old_decay_rate < 0:
            raise ValueError(
                f"`old_decay_max` must be in [0, 1) and `old_decay_rate` at least 0, got {self.old_decay_max} and "
                f"{self.old_decay_rate}."
            )
        if self.loss_weighting != "none":
            raise ValueError(
                f"`loss_weighting` must be 'none' for NFT, which has its own, got {self.loss_weighting!r}."
            )


@dataclass(kw_only=True)
class NftDataOptions(Options):
    """Prompts to generate images of."""

    prompts: str = option("", "file of prompts, one a line, or of checks (.jsonl, see docs/evaluation.md)")
    resolution: int = option(512, "side of the square images, in pixels")
    batch_size: int = option(4, "prompts per batch and process")
    num_workers: int = option(0, "processes that load prompts", changeable=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts:
            raise ValueError("`prompts` must be a file of prompts, got ''. Pass --prompts.")
        check_file("prompts", self.prompts)
        check_positive(self, "batch_size", "resolution")


@dataclass(kw_only=True)
class RewardOptions(QuantizableOptions):
    """The pipeline to adapt, and what judges its images."""

    reward: tuple[str, ...] = option(
        ("pickscore",),
        "judges: `scenes` (emoji), `clip`, `hpsv2`, `imagereward`, `pickscore`, `vqascore` or `module:function`",
    )
    reward_weights: tuple[float, ...] = option((), "weights of the judges; default: 1 each")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.reward or ("",):
            if name not in JUDGES and ":" not in name:
                raise ValueError(f"`reward` must be of {list(JUDGES)} or 'module:function', got {name!r}.")
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise ValueError(f"`reward_weights` must be {len(self.reward)} numbers, got {self.reward_weights}.")


@dataclass(kw_only=True)
class NftModelOptions(RewardOptions):
    """The pipeline to adapt, what generates its images, and what judges them."""

    rollout_quantize: str = option("no", "generate images with a copy of these bits", choices=QUANTIZED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_quantize != "no" and self.quantize != "no":
            raise ValueError(
                "`rollout_quantize` must be 'no' where `quantize` is given: the base has those bits already."
            )


@dataclass(kw_only=True)
class DpoTrainingConfig(FlowTrainingConfig, PromptTrainingConfig, AdapterTrainingConfig):
    """Training of a LoRA on pairs of images, by Diffusion-DPO."""

    output_dir: str = option("outputs/sana-dpo", "folder for checkpoints, samples, log and result", changeable=True)
    max_steps: int = option(1000, "optimizer steps", changeable=True)
    weight_decay: float = option(1e-4, "weight decay", changeable=True)
    rank: int = option(32, "rank of the adapter's matrices")
    flow_shift: float | None = option(  # type: ignore[assignment]
        None, "timestep shift; default: that of the pipeline's scheduler", changeable=True
    )
    dpo_beta: float = option(2000.0, "how little the model may depart from the base; smaller: more", changeable=True)
    sft_weight: float = option(0.0, "weight of the flow matching loss on the preferred images", changeable=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dpo_beta <= 0 or self.sft_weight < 0:
            raise ValueError(
                f"`dpo_beta` must be above 0 and `sft_weight` at least 0, got {self.dpo_beta} and {self.sft_weight}."
            )


@dataclass(kw_only=True)
class DpoDataOptions(Options):
    """Pairs of images, or prompts to generate them of."""

    pairs: str = option("", "JSON Lines file of `prompt`, `preferred`, `rejected`: a text and two image files")
    prompts: str = option(
        "", "in place of `pairs`: file of prompts, one a line, or of checks (.jsonl, see docs/evaluation.md)"
    )
    group_size: int = option(4, "images per prompt that are generated, of which the best and the worst are a pair")
    rollout_steps: int = option(20, "denoising steps of these images")
    rollout_guidance: float = option(4.5, "guidance scale of these images")
    rollout_batch_size: int = option(8, "of these images, so many are generated at a time")
    resolution: int = option(512, "side of the square images, in pixels")
    cache_dir: str = option("", "folder of latents and text vectors; default: in the output folder", changeable=True)
    batch_size: int = option(4, "pairs per batch and process")
    num_workers: int = option(0, "processes that read the cache", changeable=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of(self, "pairs", "prompts")
        check_file("pairs", self.pairs)
        check_file("prompts", self.prompts)
        check_positive(self, "batch_size", "resolution", "rollout_steps", "rollout_batch_size")
        if self.group_size < 2:
            raise ValueError(f"`group_size` must be at least 2, to compare images, got {self.group_size}.")


@dataclass(kw_only=True)
class DpoModelOptions(RewardOptions):
    """The pipeline to adapt, and what judges the images of `prompts`."""


# Class-conditional DiT on latents


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
