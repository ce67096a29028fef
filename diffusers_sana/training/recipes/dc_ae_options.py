"""The options of the three phases of DC-AE: how it trains, on which data, from which model; see `options.py`.

Nothing here imports torch.
"""

from dataclasses import dataclass

from diffusers_sana.training.config import (
    PERCEPTUAL,
    ImageDataOptions,
    TrainingConfig,
    check_exists,
    check_file,
    check_one_of,
    option,
)


@dataclass(kw_only=True)
class DCAETrainingConfig(TrainingConfig):
    """Training of an autoencoder for one phase of DC-AE."""

    output_dir: str = option("outputs/dc_ae", "folder for checkpoints, samples, log and result", changeable=True)
    learning_rate: float | None = option(  # type: ignore[assignment]
        None, "peak learning rate; default: the phase's", changeable=True
    )
    betas: tuple[float, float] | None = option(  # type: ignore[assignment]
        None, "the optimizer's betas; default: the phase's", changeable=True
    )
    weight_decay: float | None = option(  # type: ignore[assignment]
        None, "weight decay of matrices and kernels; default: the phase's", changeable=True
    )
    phase: int = option(
        1, "1: train all at low resolution, 2: latent side at high, 3: decoder head with GAN", choices=(1, 2, 3)
    )
    trained_prefixes: tuple[str, ...] | None = option(None, "key prefixes that train; default: the phase's")
    mse_weight: float = option(0.0, "weight of the mean squared error beside L1", changeable=True)
    latent_weight: float = option(
        0.0, "weight of the loss that pulls the mean square of each latent channel to 1", changeable=True
    )
    latent_noise: float = option(
        0.0,
        "standard deviation of noise on latents in training, so that the decoder tolerates errors of a generator",
        changeable=True,
    )
    perceptual_weight: float = option(0.25, "weight of the perceptual loss; 0 leaves it out", changeable=True)
    perceptual_every: int = option(
        1, "steps between uses of the perceptual loss, its weight raised to match", changeable=True
    )
    perceptual: str = option(
        "random",
        "`random`: seeded features without a download, or `lpips`: that package's VGG",
        choices=PERCEPTUAL,
    )
    perceptual_crop: int = option(0, "side of the random square the perceptual loss sees; 0 is all", changeable=True)
    gan_weight: float = option(0.5, "weight of the adversarial loss in phase 3", changeable=True)
    gan_warmup_steps: int = option(
        0, "steps in which only the discriminator trains against the GAN loss", changeable=True
    )
    discriminator_channels: int = option(64, "width of the discriminator's first layer")
    latent_prefix_step: int = option(
        0, "structured latents (DC-AE 1.5): keep a random multiple of this many channels; 0 keeps all"
    )
    scaling_batches: int = option(
        16, "batches over which the latents' scaling factor is measured at the end", changeable=True
    )
    channels_last: bool = option(
        True, "keep images channels-last in memory, which suits convolutions", changeable=True
    )


@dataclass(kw_only=True)
class DCAEDataOptions(ImageDataOptions):
    """Images to train on; captions are not read."""

    resolution: int | None = option(None, "side of the training images; default: the phase's")


@dataclass(kw_only=True)
class DCAEModelOptions:
    """The autoencoder to start from: a new one, or one trained by the phase before."""

    model_config: str = option("", "config.json of a new AutoencoderDC")
    pretrained: str = option("", "folder or repository of an AutoencoderDC to continue from")

    def __post_init__(self) -> None:
        check_one_of(self, "model_config", "pretrained")
        check_file("model_config", self.model_config)
        check_exists("pretrained", self.pretrained)
