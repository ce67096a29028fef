"""Train a class-conditional DiT on the latents of an autoencoder, by flow matching (arXiv 2212.09748, 2401.08740).

    python examples/train_dc_ae_dit.py --data photos --vae mit-han-lab/dc-ae-f64c128-in-1.0-diffusers

`photos` has one sub-folder a class. The autoencoder is any AutoencoderDC, with patches of one latent as in its paper
(arXiv 2410.10733), or an AutoencoderKL, with `--patch_size 2`. Latents are computed once. `output_dir/model` is a
folder of diffusers' DiTPipeline. Another script calls `train(config, batches, transformer, class_names, vae)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from diffusers_sana import AutoencoderDC
from diffusers_sana.training.config import check_choice, option, parse_config, run_script
from diffusers_sana.training.data.batches import Batches, collate, make_loader
from diffusers_sana.training.data.images import Images, load_images
from diffusers_sana.training.data.latent_cache import fill_cache, model_digest
from diffusers_sana.training.data.sources import FolderSource, ImageDataConfig
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.flow_matching import (
    interpolate,
    sample_euler,
    sample_sigmas,
    timesteps_of,
    velocity_target,
)
from diffusers_sana.training.optimizers import make_adamw
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.state_files import copy_with_weights


AUTOENCODERS = {"AutoencoderDC": AutoencoderDC, "AutoencoderKL": AutoencoderKL}
NO_CLASS = 1000  # DiTPipeline's label for guidance, whatever the number of classes


@dataclass(kw_only=True)
class DiTTrainingConfig(ImageDataConfig):
    """Settings of a class-conditional training; the transformer is DiT-S unless said otherwise."""

    output_dir: str = option("outputs/dit", "folder for checkpoints, samples, log and result", changeable=True)
    data: str = option(
        "",
        "folder with a sub-folder of images for each class; or WebDataset tars, or a dataset of the Hub, whose"
        " `caption_column` is the class (command line only)",
        changeable=True,
    )
    vae: str = option("", "AutoencoderDC or AutoencoderKL, folder or repository (command line only)")
    vae_subfolder: str = option("", "where in `vae` it is, such as `vae` of a pipeline (command line only)")
    cache_dir: str = option("", "folder of latents; default: in `output_dir` (command line only)", changeable=True)
    batch_size: int = option(256, "images a batch and process (command line only)")
    num_workers: int = option(0, "processes that read the cache (command line only)", changeable=True)
    resolution: int = option(512, "side of the square images in pixels (command line only)")
    patch_size: int = option(1, "latents a side of a token (command line only)")
    num_layers: int = option(12, "blocks (command line only)")
    num_attention_heads: int = option(6, "heads (command line only)")
    attention_head_dim: int = option(64, "width of a head (command line only)")
    learning_rate: float | None = option(1e-4, "peak learning rate", changeable=True)
    betas: tuple[float, float] | None = option((0.9, 0.999), "AdamW betas", changeable=True)
    weight_decay: float | None = option(0.0, "AdamW weight decay of matrices and kernels", changeable=True)
    ema_decay: float = option(
        0.9999, "decay of the averaged weights that are saved; 0 saves the trained weights", changeable=True
    )
    flow_shift: float = option(1.0, "shift of the noise levels", changeable=True)
    logit_mean: float = option(0.0, "mean of the logit-normal noise levels before the shift", changeable=True)
    logit_std: float = option(
        1.0, "standard deviation of the logit-normal noise levels before the shift", changeable=True
    )
    class_dropout: float = option(0.1, "share of labels replaced by none, for guidance", changeable=True)
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", changeable=True
    )
    sample_classes: tuple[str, ...] = option(
        (), "classes of the sample grids; default: the first ones, 8 pictures", changeable=True
    )
    sample_steps: int = option(20, "Euler steps of the sample grids", changeable=True)
    sample_guidance: float = option(4.0, "guidance scale of the sample grids", changeable=True)


def train(
    config: DiTTrainingConfig,
    batches: Batches,
    transformer: DiTTransformer2DModel,
    class_names: list[str],
    vae: nn.Module | None = None,
) -> None:
    """Train `transformer`; saved in `config.output_dir/model`, as a DiTPipeline if there is a `vae`.

    Args:
        config: the settings.
        batches: iterable of batches, or a function from the number of batches already used to the iterable of those
            that follow, which makes a resumed run exact. A batch holds scaled `latents` `[B, C, h, h]` and
            `class_labels` `[B]`, positions in `class_names`.
        transformer: must have room for 1000 classes, since DiTPipeline takes label 1000 for none, and as many
            channels out as in.
        class_names: at most 1000.
        vae: the autoencoder of the latents; frozen. Sample grids need it.

    Raises:
        ValueError: for a transformer or class names that DiTPipeline could not use.
    """
    if transformer.config.num_embeds_ada_norm != NO_CLASS:
        raise ValueError(
            f"`transformer` must have `num_embeds_ada_norm` {NO_CLASS}, since DiTPipeline takes the label after the"
            f" last for no class, got {transformer.config.num_embeds_ada_norm}. Leave it at its default."
        )
    if transformer.config.out_channels != transformer.config.in_channels:
        raise ValueError(
            "`transformer` must have `out_channels` equal to `in_channels` in its config, which DiTPipeline reads,"
            f" got {transformer.config.out_channels} and {transformer.config.in_channels}. Set both."
        )
    if not 0 < len(class_names) <= NO_CLASS:
        raise ValueError(f"`class_names` must be 1 to {NO_CLASS} names, got {len(class_names)}. Use fewer classes.")
    for name in config.sample_classes:
        check_choice("sample_classes", name, tuple(class_names))
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    if vae is not None:
        vae.to(accelerator.device).eval().requires_grad_(False)
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # each block has its own, and would drop labels without the others
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if config.compile:
        for block in transformer.transformer_blocks:
            block.compile()
    optimizer = make_adamw(transformer.parameters(), config.learning_rate, config.betas, config.weight_decay)
    model, optimizer = accelerator.prepare(transformer.train(), optimizer)
    labels_shown = torch.tensor(
        [class_names.index(name) for name in config.sample_classes] or [at % len(class_names) for at in range(8)],
        device=accelerator.device,
    )

    def predict(latents: Tensor, sigmas: Tensor, labels: Tensor) -> Tensor:
        """The velocity."""
        return model(latents, timesteps_of(sigmas), labels, return_dict=False)[0].float()

    def sample(path: Path) -> None:
        if vae is None:
            return
        labels = torch.cat([labels_shown, torch.full_like(labels_shown, NO_CLASS)])

        def guided(latents: Tensor, sigmas: Tensor) -> Tensor:
            full, empty = predict(latents.repeat(2, 1, 1, 1), sigmas.repeat(2), labels).chunk(2)
            return empty + config.sample_guidance * (full - empty)

        shape = transformer.config.in_channels, *[transformer.config.sample_size] * 2
        noise = torch.randn(len(labels_shown), *shape, generator=torch.Generator().manual_seed(config.seed))
        model.eval()
        latents = sample_euler(guided, noise.to(accelerator.device), config.sample_steps, config.flow_shift)
        model.train()
        with torch.no_grad():
            images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        if accelerator.is_main_process:
            save_image_grid(images, path)

    def save(folder: Path) -> None:
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            save_parts(folder, copy_with_weights(transformer, state), vae, class_names, config.flow_shift)

    loop = TrainingLoop(config, accelerator, [model], [optimizer], save=save, sample=sample)
    for batch in loop.run(batches):
        latents = batch["latents"].float()
        noise = torch.randn_like(latents)
        sigmas = sample_sigmas(
            len(latents), config.flow_shift, config.logit_mean, config.logit_std, accelerator.device
        )
        dropped = torch.rand(len(latents), device=accelerator.device) < config.class_dropout
        labels = batch["class_labels"].masked_fill(dropped, NO_CLASS)
        with accelerator.accumulate(model):
            velocity = predict(interpolate(latents, noise, sigmas), sigmas, labels)
            loss = F.mse_loss(velocity, velocity_target(latents, noise))
            accelerator.backward(loss * loop.weight)
            if accelerator.sync_gradients and config.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        loop.report(images=len(latents), loss=loss)


def save_parts(
    folder: Path, transformer: DiTTransformer2DModel, vae: nn.Module | None, class_names: list[str], flow_shift: float
) -> None:
    """Save a DiTPipeline that diffusers alone can load, or the transformer where there is no autoencoder."""
    if vae is None:
        transformer.save_pretrained(folder / "transformer")
        return
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    )
    pipe = DiTPipeline(transformer, vae, scheduler)
    pipe.register_to_config(id2label=dict(enumerate(class_names)), vae=("diffusers", type(vae).__name__))
    pipe.save_pretrained(folder)


def load_autoencoder(name: str, subfolder: str = "") -> nn.Module:
    """An AutoencoderDC or AutoencoderKL, whichever the config in a folder or repository names.

    Raises:
        ValueError: for none, for another class, and for a `shift_factor`, which DiTPipeline would leave out.
    """
    if not name:
        raise ValueError("`vae` must be an autoencoder's folder or repository, got ''. Pass --vae.")
    class_name = AutoencoderDC.load_config(name, subfolder=subfolder or None).get("_class_name")
    check_choice("vae", class_name, tuple(AUTOENCODERS))
    vae = AUTOENCODERS[class_name].from_pretrained(name, subfolder=subfolder or None)
    if vae.config.get("shift_factor"):
        raise ValueError(
            f"`vae` must have no `shift_factor`, since DiTPipeline leaves it out, got {vae.config.shift_factor}. Use"
            " another autoencoder."
        )
    return vae


@torch.no_grad()
def encode_images(vae: nn.Module, pixel_values: Tensor) -> Tensor:
    """Scaled latents `[B, C, h, w]` of images `[B, 3, H, W]` in [-1, 1]; the likeliest ones of an AutoencoderKL."""
    encoded = vae.encode(pixel_values.to(vae.dtype))
    latents = encoded.latent_dist.mode() if isinstance(vae, AutoencoderKL) else encoded.latent
    return latents.float() * vae.config.scaling_factor


def class_images(config: DiTTrainingConfig) -> tuple[Images, list[str]]:
    """Square images whose `text` is the name of their class, and the names in order.

    Raises:
        ValueError: there are no images, or images without a class.
    """
    images = load_images(config, [(config.resolution, config.resolution)], captions="optional")
    for index, name in enumerate(images.names):
        if isinstance(images.source, FolderSource):
            images.captions[index] = name.split("/")[0] if "/" in name else ""
        if not images.captions[index]:
            raise ValueError(
                f"`data` must say the class of each image, by its sub-folder or by `caption_column`, but {name!r} has"
                " none. Move or remove it."
            )
    return images, sorted(set(images.captions))


def make_dit(config: DiTTrainingConfig, latents: Tensor) -> DiTTransformer2DModel:
    """A new DiT for latents like these, `[C, h, h]`; as in its paper each block begins as the identity.

    Raises:
        ValueError: where patches do not fill the latents.
    """
    channels, size, _ = latents.shape
    if config.patch_size < 1 or size % config.patch_size:
        raise ValueError(f"`patch_size` must divide the latents' side {size}, got {config.patch_size}. Use 1.")
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=channels,
        out_channels=channels,
        num_layers=config.num_layers,
        sample_size=size,
        patch_size=config.patch_size,
    )
    blocks = transformer.transformer_blocks
    for layer in (*(block.norm1.linear for block in blocks), transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in blocks:
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    return transformer


def prepare(config: DiTTrainingConfig) -> tuple[Callable, DiTTransformer2DModel, list[str], nn.Module]:
    """Cached batches, a new transformer, the classes' names and the autoencoder, as `train` takes them."""
    device = make_accelerator(config).device
    set_seed(config.seed)
    vae = load_autoencoder(config.vae, config.vae_subfolder).to(device).eval()
    images, class_names = class_images(config)

    def encode(item: dict[str, Any]) -> dict[str, Tensor]:
        return {"latents": encode_images(vae, item["pixel_values"][None].to(device))[0]}

    def with_labels(items: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(items) | {"class_labels": torch.tensor([class_names.index(item["text"]) for item in items])}

    cache = config.cache_dir or str(Path(config.output_dir) / "cache")
    dataset = fill_cache(images, cache, encode, {"vae": model_digest(vae)})
    batches = make_loader(dataset, config.batch_size, config.seed, config.num_workers, with_labels)
    return batches, make_dit(config, dataset[0]["latents"]), class_names, vae


def main(argv: list[str] | None = None) -> None:
    """The command line: a folder of classes, and the autoencoder whose latents the transformer learns."""
    config = parse_config(DiTTrainingConfig, argv, description=__doc__)
    train(config, *prepare(config))


if __name__ == "__main__":
    run_script(main)
