"""The options of post-training, by rewards (NFT) and on pairs of images (DPO); see `options.py`.

Nothing here imports torch.
"""

from dataclasses import dataclass

from diffusers_sana.training.config import Options, check_file, check_one_of, check_positive, option
from diffusers_sana.training.recipes.transformer_options import (
    QUANTIZED,
    AdapterTrainingConfig,
    FlowTrainingConfig,
    PromptTrainingConfig,
    QuantizableOptions,
)


JUDGES = ("clip", "hpsv2", "imagereward", "pickscore", "scenes", "vqascore")


@dataclass(kw_only=True)
class PostTrainingConfig(FlowTrainingConfig, PromptTrainingConfig, AdapterTrainingConfig):
    """Settings of the training of a LoRA that improves a pipeline."""

    max_steps: int = option(1000, "optimizer steps", changeable=True)
    weight_decay: float = option(1e-4, "weight decay", changeable=True)
    rank: int = option(32, "rank of the adapter's matrices")
    flow_shift: float | None = option(  # type: ignore[assignment]
        None, "timestep shift; default: that of the pipeline's scheduler", changeable=True
    )


@dataclass(kw_only=True)
class NftTrainingConfig(PostTrainingConfig):
    """Training of a LoRA by rewards, with DiffusionNFT; defaults are its authors' where they give any."""

    output_dir: str = option("outputs/sana-nft", "folder for checkpoints, samples, log and result", changeable=True)
    learning_rate: float = option(3e-4, "peak learning rate", changeable=True)
    lora_alpha: int | None = option(64, "the adapter is scaled by lora_alpha / rank")
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
class DpoTrainingConfig(PostTrainingConfig):
    """Training of a LoRA on pairs of images, by Diffusion-DPO."""

    output_dir: str = option("outputs/sana-dpo", "folder for checkpoints, samples, log and result", changeable=True)
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
