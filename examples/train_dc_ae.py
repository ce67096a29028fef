"""Train a deep-compression autoencoder in the three phases of DC-AE (arXiv 2410.10733).

    python examples/train_dc_ae.py --data photos --model_config config.json --output_dir outputs/ae1
    python examples/train_dc_ae.py --data photos --pretrained outputs/ae1/model --phase 2 --output_dir outputs/ae2
    python examples/train_dc_ae.py --data photos --pretrained outputs/ae2/model --phase 3 --output_dir outputs/ae3

Another script calls `train(config, batches, model)` with any iterable of batches `{"pixel_values": [B, 3, H, W]}` in
[-1, 1]. The trained model is the ordinary diffusers folder `output_dir/model`.
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

from diffusers_sana import AutoencoderDC
from diffusers_sana.files import read_json
from diffusers_sana.training.config import option, parse_config, run_script
from diffusers_sana.training.data.batches import Batches, iterate_batches, make_loader
from diffusers_sana.training.data.images import load_images
from diffusers_sana.training.data.sources import ImageDataConfig
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.adversarial import PatchDiscriminator, discriminator_loss, generator_loss
from diffusers_sana.training.objectives.perceptual import PerceptualLoss
from diffusers_sana.training.optimizers import make_adamw, make_optimizer
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.dc_ae import (
    DecodedLatents,
    draw_latent_prefix,
    get_phase,
    mask_latents,
    select_parameters,
    set_training_modes,
)
from diffusers_sana.training.state_files import copy_with_weights


@dataclass(kw_only=True)
class DCAETrainingConfig(ImageDataConfig):
    """Settings of one phase; what is None comes from the phase's entry in `training.recipes.dc_ae.PHASES`."""

    output_dir: str = option("outputs/dc_ae", "folder for checkpoints, samples, log and result", changeable=True)
    model_config: str = option("", "config.json of a new AutoencoderDC (command line only)")
    pretrained: str = option("", "folder or repository of an AutoencoderDC to continue from (command line only)")
    batch_size: int = option(16, "images a batch and process (command line only)")
    num_workers: int = option(4, "processes that load images (command line only)", changeable=True)
    resolution: int | None = option(None, "side of the training images (command line only); None takes the phase's")
    phase: int = option(1, "1: train all at low resolution, 2: latent side at high, 3: decoder head with GAN")
    trained_prefixes: tuple[str, ...] | None = option(None, "key prefixes that train; None takes the phase's")
    optimizer: str = option("adamw", "`adamw`, `adamw8bit` or `muon`, for the autoencoder")
    mse_weight: float = option(0.0, "weight of the mean squared error beside L1", changeable=True)
    latent_weight: float = option(
        0.0, "weight of the pull of each latent channel's mean square towards 1", changeable=True
    )
    latent_noise: float = option(
        0.0,
        "standard deviation of noise on latents in training, so that those of a generator may err",
        changeable=True,
    )
    perceptual_weight: float = option(0.25, "weight of the perceptual loss; 0 leaves it out", changeable=True)
    perceptual_every: int = option(
        1, "steps between uses of the perceptual loss, its weight raised to match", changeable=True
    )
    perceptual_crop: int = option(0, "side of the random square the perceptual loss sees; 0 is all", changeable=True)
    gan_weight: float = option(0.5, "weight of the adversarial loss in phase 3", changeable=True)
    gan_warmup_steps: int = option(
        0, "steps in which only the discriminator trains against the GAN loss", changeable=True
    )
    discriminator_channels: int = option(64, "width of the discriminator's first layer")
    latent_prefix_step: int = option(0, "structured latents (DC-AE 1.5): keep a random multiple of so many channels")
    scaling_batches: int = option(
        16, "batches over which the latents' scaling factor is measured at the end", changeable=True
    )
    channels_last: bool = option(True, "keep images channels-last in memory, which convolutions like", changeable=True)


def train(
    config: DCAETrainingConfig, batches: Batches, model: ModelMixin, perceptual_network: nn.Module | None = None
) -> None:
    """Train `model` for one phase; the result is saved in `config.output_dir/model`.

    Args:
        config: the settings.
        batches: iterable of batches `{"pixel_values": [B, 3, H, W] in [-1, 1]}`, or a function from the number of
            batches already used to the iterable of those that follow, which makes a resumed run exact.
        model: an AutoencoderDC, new (phase 1) or trained by the phase before.
        perceptual_network: module from images to a list of feature maps; default: seeded random features.
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
    discriminator = None
    if phase.adversarial:
        discriminator = PatchDiscriminator(config.discriminator_channels).to(memory_format=memory_format)
        optimizer = make_adamw(discriminator.parameters(), *optimizer_settings)
        discriminator, optimizer = accelerator.prepare(discriminator, optimizer)
        trained.append(discriminator)
        optimizers.append(optimizer)
    perceptual = PerceptualLoss(perceptual_network, config.perceptual_crop)
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
        exported = copy_with_weights(plain_model, state)
        if trains_encoder and loop.is_ending:
            unseen = islice(iterate_batches(batches, loop.batches_used), config.scaling_batches)
            exported.register_to_config(scaling_factor=measure_scaling_factor(exported, unseen))
        exported.save_pretrained(folder)

    loop = TrainingLoop(config, accelerator, trained, optimizers, save=save, sample=sample, averaged=[model])
    for batch in loop.run(batches):
        pixel_values = batch["pixel_values"].contiguous(memory_format=memory_format)
        shown = shown or [pixel_values[:8]]
        if latent_mask is not None:
            draw_latent_prefix(latent_mask, config.latent_prefix_step)
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
                judge = accelerator.unwrap_model(discriminator).requires_grad_(False)
                terms["generator"] = generator_loss(judge(reconstructed))
                judge.requires_grad_(True)
                loss = loss + config.gan_weight * terms["generator"]
            accelerator.backward(loss * loop.weight)
            if discriminator is not None:
                real_logits, fake_logits = discriminator(torch.cat([pixel_values, reconstructed.detach()])).chunk(2)
                terms["discriminator"] = discriminator_loss(real_logits, fake_logits)
                accelerator.backward(terms["discriminator"] * loop.weight)
            for module, optimizer in zip(trained, optimizers, strict=True):
                if accelerator.sync_gradients and config.max_grad_norm:
                    accelerator.clip_grad_norm_(module.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        loop.report(images=len(pixel_values), loss=loss, **terms)


@torch.no_grad()
def measure_scaling_factor(model: ModelMixin, batches: Iterable[dict[str, Any]]) -> float:
    """1 / (root mean square of an autoencoder's latents over `batches`)."""
    squares = [model.encode(batch["pixel_values"].to(model.device)).latent.square().mean() for batch in batches]
    return torch.stack(squares).mean().rsqrt().item()


def main(argv: list[str] | None = None) -> None:
    """The command line: an image folder, and either a new model's config or a trained model."""
    config = parse_config(DCAETrainingConfig, argv, description=__doc__)
    if bool(config.model_config) == bool(config.pretrained):
        raise ValueError("exactly one of `model_config` and `pretrained` must be given. Pass one of them.")
    make_accelerator(config)
    set_seed(config.seed)
    if config.pretrained:
        model = AutoencoderDC.from_pretrained(config.pretrained)
    else:
        model = AutoencoderDC.from_config(read_json(config.model_config))
    resolution = config.resolution or get_phase(config.phase).resolution
    dataset = load_images(config, [(resolution, resolution)], captions="ignored")
    train(config, make_loader(dataset, config.batch_size, config.seed, config.num_workers), model)


if __name__ == "__main__":
    run_script(main)
