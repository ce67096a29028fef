"""The options that several recipes of diffusion transformers share; see `options.py`.

Nothing here imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers_sana.arguments import TARGET_PRECISIONS
from diffusers_sana.training.config import (
    ImageDataOptions,
    Options,
    TrainingConfig,
    check_positive,
    check_pretrained,
    option,
)


LOSS_WEIGHTINGS = ("none", "min_snr", "cosmap")
BUCKETS = ("pipelines", "authors")
QUANTIZED = ("no", *TARGET_PRECISIONS)


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


@dataclass(kw_only=True)
class QuantizableOptions(PretrainedOptions):
    """The pipeline to start from, and the bits of the base that a LoRA trains beside."""

    quantize: str = option("no", "`no`, or `int4`, `nvfp4` or `int8`: quantize the base first", choices=QUANTIZED)
    quantize_rank: int = option(32, "rank of the low-rank branch beside the quantized weights")
