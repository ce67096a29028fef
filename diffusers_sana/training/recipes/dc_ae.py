"""Training of a deep-compression autoencoder: decoupled high-resolution adaptation (DC-AE, arXiv 2410.10733).

The autoencoder is trained whole at low resolution; then only its latent side is adapted at high resolution, where
training everything would not fit; then only the decoder's head is refined against a discriminator (section 3.3 and
appendix A). The paper does not list the layers of phases 2 and 3, so the prefixes are settings.

Structured latents (DC-AE 1.5, arXiv 2508.00413): each step keeps only a random number of leading latent channels
before the decoder; the loss does not change. So early channels learn the object, later ones the detail. It pays off
with many channels (128); with 32 the paper finds the plain autoencoder slightly better.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from diffusers_sana.files import read_json
from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.training.config import check_choice
from diffusers_sana.training.data.batches import Batches, iterate_batches, make_loader
from diffusers_sana.training.data.images import load_images
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.adversarial import PatchDiscriminator, discriminator_loss, generator_loss
from diffusers_sana.training.objectives.perceptual import make_perceptual
from diffusers_sana.training.optimizers import make_adamw, make_optimizer
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.dc_ae_options import DCAEDataOptions, DCAEModelOptions, DCAETrainingConfig
from diffusers_sana.training.state_files import copy_with_weights


@dataclass(frozen=True)
class Phase:
    """What one phase trains, and its settings in the paper.

    Attributes:
        trained_prefixes: key prefixes of the parameters that train; "" means all of them.
        resolution: side of the training images in pixels.
        learning_rate, betas, weight_decay: of AdamW; the learning rate is constant.
        adversarial: whether a discriminator takes part.
    """

    trained_prefixes: tuple[str, ...]
    resolution: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    adversarial: bool


PHASES = {
    1: Phase(("",), 256, 6.4e-5, (0.9, 0.999), 0.1, False),
    2: Phase(("encoder.conv_out.", "decoder.conv_in."), 512, 1.6e-5, (0.9, 0.999), 0.001, False),
    # The paper gives no weight decay for phase 3; that of phase 2 is kept.
    3: Phase(("decoder.norm_out.", "decoder.conv_out."), 256, 5.4e-5, (0.5, 0.9), 0.001, True),
}


def get_phase(phase: int) -> Phase:
    """The settings of phase 1, 2 or 3; a ValueError for any other number."""
    check_choice("phase", phase, tuple(PHASES))
    return PHASES[phase]


def train(
    config: DCAETrainingConfig,
    batches: Batches,
    model: Any,
    perceptual_network: nn.Module | None = None,
    options: tuple[Any, ...] = (),
) -> None:
    """Train `model` for one phase; the result is saved in `config.output_dir/model`.

    Args:
        config: a DCAETrainingConfig.
        batches: see `Batches`; of `{"pixel_values": [B, 3, H, W] in [-1, 1]}`.
        model: an AutoencoderDC, new (phase 1) or trained by the phase before.
        perceptual_network: module from images to a list of feature maps; default: as `config.perceptual` says.
        options: groups of options for data and models, that checkpoints record; see `TrainingLoop`.
    """
    phase = get_phase(config.phase)
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    trained_prefixes = phase.trained_prefixes if config.trained_prefixes is None else config.trained_prefixes
    optimizer_settings = (
        phase.learning_rate if config.learning_rate is None else config.learning_rate,
        phase.betas if config.betas is None else config.betas,
        phase.weight_decay if config.weight_decay is None else config.weight_decay,
    )
    optimizer = make_optimizer(config.optimizer, select_parameters(model, trained_prefixes), *optimizer_settings)
    latents = DecodedLatents(model, config.latent_noise)
    if config.latent_prefix_step:
        mask_latents(model)
    if config.compile:
        model.encoder.compile()
        model.decoder.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    plain_model = accelerator.unwrap_model(model)
    latent_mask = plain_model.decoder.latent_mask if config.latent_prefix_step else None
    trained, optimizers = [model], [optimizer]
    discriminator: Any = None
    if phase.adversarial:
        discriminator = PatchDiscriminator(config.discriminator_channels)
        discriminator.to(memory_format=memory_format)
        if config.optimizer == "prodigy":  # whose learning rate is none
            optimizer_settings = (phase.learning_rate, *optimizer_settings[1:])
        optimizer = make_adamw(discriminator.parameters(), *optimizer_settings)
        discriminator, optimizer = accelerator.prepare(discriminator, optimizer)
        trained.append(discriminator)
        optimizers.append(optimizer)
    perceptual: Any = make_perceptual(config.perceptual, perceptual_network, config.perceptual_crop)
    perceptual.to(accelerator.device, memory_format=memory_format)
    shown: list[Tensor] = []  # the first batch of the run, for the sample grids

    def sample(path: Path) -> None:
        if latent_mask is not None:
            latent_mask.fill_(1)
        model.eval()
        with torch.no_grad():
            reconstructed = model(shown[0]).sample
        set_training_modes(model)
        if accelerator.is_main_process:
            save_image_grid(torch.stack([shown[0], reconstructed.float()], dim=1).flatten(0, 1), path)

    trains_encoder = any(parameter.requires_grad for parameter in plain_model.encoder.parameters())

    def save(folder: Path) -> None:
        state = accelerator.get_state_dict(model)
        if not accelerator.is_main_process:
            return
        exported: Any = copy_with_weights(plain_model, state)
        if trains_encoder and loop.is_ending:
            unseen = islice(iterate_batches(batches, loop.batches_used), config.scaling_batches)
            exported.register_to_config(scaling_factor=measure_scaling_factor(exported, unseen))
        exported.save_pretrained(folder)

    loop = TrainingLoop(
        config, accelerator, trained, optimizers, save=save, sample=sample, ema_modules=[model], options=options
    )
    for batch in loop.run(batches):
        pixel_values = batch["pixel_values"].contiguous(memory_format=memory_format)
        shown = shown or [pixel_values[:8]]
        if latent_mask is not None:
            sample_latent_prefix(latent_mask, config.latent_prefix_step)
        with accelerator.accumulate(*trained):
            reconstructed = model(pixel_values).sample.float()
            l1 = F.l1_loss(reconstructed, pixel_values)
            loss, terms = l1, {"l1": l1}
            if config.mse_weight:
                terms["mse"] = F.mse_loss(reconstructed, pixel_values)
                loss = loss + config.mse_weight * terms["mse"]
            if config.latent_weight:
                terms["latent"] = latents.distance_from_unit_scale()
                loss = loss + config.latent_weight * terms["latent"]
            if config.perceptual_weight and loop.step % config.perceptual_every == 0:
                with accelerator.autocast():
                    terms["perceptual"] = perceptual(reconstructed, pixel_values)
                loss = loss + config.perceptual_weight * config.perceptual_every * terms["perceptual"]
            if discriminator is not None and loop.step >= config.gan_warmup_steps:
                # Without its DDP wrapper, which would wait for gradients that are not wanted here.
                frozen = accelerator.unwrap_model(discriminator).requires_grad_(False)
                terms["generator"] = generator_loss(frozen(reconstructed))
                frozen.requires_grad_(True)
                loss = loss + config.gan_weight * terms["generator"]
            loop.backward(loss)
            if discriminator is not None:
                real_logits, fake_logits = discriminator(torch.cat([pixel_values, reconstructed.detach()])).chunk(2)
                terms["discriminator"] = discriminator_loss(real_logits, fake_logits)
                loop.backward(terms["discriminator"])
            loop.update()
        loop.report(images=len(pixel_values), loss=loss, **terms)


@torch.no_grad()
def measure_scaling_factor(model: ModelMixin, batches: Iterable[dict[str, Any]]) -> float:
    """1 / (root mean square of an autoencoder's latents over `batches`)."""
    squares = [model.encode(batch["pixel_values"].to(model.device)).latent.square().mean() for batch in batches]
    return torch.stack(squares).mean().rsqrt().item()


def run(config: DCAETrainingConfig, data: DCAEDataOptions, model: DCAEModelOptions) -> None:
    """Train a new autoencoder or one of the phase before on images: what `examples/train_dc_ae.py` does."""
    make_accelerator(config)
    set_seed(config.seed)
    if model.pretrained:
        autoencoder = AutoencoderDC.from_pretrained(model.pretrained)
    else:
        autoencoder = AutoencoderDC.from_config(read_json(model.model_config))
    resolution = data.resolution or get_phase(config.phase).resolution
    dataset = load_images(data, [(resolution, resolution)], captions="ignored")
    batches = make_loader(dataset, data.batch_size, config.seed, data.num_workers)
    train(config, batches, autoencoder, options=(data, model))


def select_parameters(model: nn.Module, prefixes: tuple[str, ...]) -> list[nn.Parameter]:
    """Let exactly the parameters under `prefixes` train, freeze the others, and return those that train.

    Raises a ValueError when a prefix matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            roots = sorted({".".join(name.split(".")[:2]) for name in names})
            raise ValueError(f"`trained_prefixes` must match parameters, got {prefix!r}. The model has {roots}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes)))
    set_training_modes(model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_training_modes(model: nn.Module) -> None:
    """Training mode, but evaluation mode where all parameters are frozen: a frozen batch norm keeps its statistics."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def mask_latents(model: ModelMixin) -> None:
    """Make an autoencoder's decoder multiply its latents with its new buffer `latent_mask`, all ones `[1, C, 1, 1]`.

    The buffer stays outside the state dict; the saved model is an ordinary one.
    """
    mask = torch.ones(1, model.config.latent_channels, 1, 1)
    model.decoder.register_buffer("latent_mask", mask, persistent=False)
    model.decoder.register_forward_pre_hook(lambda decoder, arguments: (arguments[0] * decoder.latent_mask,))


def sample_latent_prefix(mask: Tensor, step: int) -> None:
    """Let `mask` keep the first c' channels, c' sampled uniformly from step, 2 step, ..., all channels."""
    channels = mask.shape[1]
    kept = min(step * int(torch.randint(1, -(-channels // step) + 1, ())), channels)
    mask[:, :kept], mask[:, kept:] = 1, 0


class DecodedLatents:
    """The latents that the decoder of `model` was last given, to which it adds `noise` while it trains."""

    def __init__(self, model: ModelMixin, noise: float):
        self.noise, self.last = noise, torch.empty(0)
        model.decoder.register_forward_pre_hook(self._keep)

    def _keep(self, decoder: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.last, *others = arguments
        if not (self.noise and torch.is_grad_enabled()):
            return arguments
        return self.last + self.noise * torch.randn_like(self.last), *others

    def distance_from_unit_scale(self) -> Tensor:
        """Mean over the channels of the squared distance of their mean square to 1."""
        return (self.last.float().square().mean((0, 2, 3)) - 1).square().mean()
