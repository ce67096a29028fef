"""The options of the training of SANA-Video; see `options.py`.

Nothing here imports torch.
"""

from dataclasses import dataclass

from diffusers_sana.training.config import ImageDataOptions, check_positive, option
from diffusers_sana.training.recipes.transformer_options import (
    AdapterTrainingConfig,
    PromptFlowTrainingConfig,
    QuantizableOptions,
)


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
    """The pipeline to start from, and the bits of the base of a LoRA."""

    pretrained: str = option("", "SanaVideoPipeline folder or repository; a SanaPipeline's weights begin as one")
