"""Training of a class-conditional DiT on an autoencoder's latents, by flow matching (arXiv 2212.09748, 2401.08740)."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor, nn

from diffusers_sana.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers_sana.training.config import check_choice
from diffusers_sana.training.data.batches import Batches, collate, make_loader
from diffusers_sana.training.data.images import Images, load_images
from diffusers_sana.training.data.latent_cache import fill_cache, model_digest
from diffusers_sana.training.data.sources import FolderSource
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.flow_matching import noisy_batch, timesteps_of, velocity_errors
from diffusers_sana.training.optimizers import optimizer_of
from diffusers_sana.training.recipes.dc_ae_dit_options import DiTDataOptions, DiTModelOptions, DiTTrainingConfig
from diffusers_sana.training.recipes.text_to_image import (
    encode_images,
    freeze,
    prepare_blocks,
    sample_noise,
    save_guided_samples,
)
from diffusers_sana.training.state_files import copy_with_weights


AUTOENCODERS = {"AutoencoderDC": AutoencoderDC, "AutoencoderKL": AutoencoderKL}
NO_CLASS = 1000  # DiTPipeline's label for guidance, whatever the number of classes


def train(
    config: DiTTrainingConfig,
    batches: Batches,
    transformer: Any,
    class_names: list[str],
    vae: nn.Module | None = None,
    options: tuple[Any, ...] = (),
) -> None:
    """Train `transformer`; saved in `config.output_dir/model`, as a DiTPipeline if there is a `vae`.

    Args:
        config: a DiTTrainingConfig.
        batches: see `Batches`. A batch holds scaled `latents` `[B, C, h, h]` and
            `class_labels` `[B]`, positions in `class_names`.
        transformer: a DiTTransformer2DModel with room for 1000 classes, since DiTPipeline takes label 1000 for none,
            and with as many output as input channels.
        class_names: at most 1000.
        vae: the autoencoder of the latents; frozen. Sample grids need it.
        options: groups of options for data and models, that checkpoints record; see `TrainingLoop`.

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
    freeze(accelerator.device, vae)
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # each block has its own, and would drop labels without the others
    prepare_blocks(config, transformer)
    optimizer = optimizer_of(config, transformer.parameters())
    model, optimizer = accelerator.prepare(transformer.train(), optimizer)
    labels_shown = torch.tensor(
        [class_names.index(name) for name in config.sample_classes] or [at % len(class_names) for at in range(8)],
        device=accelerator.device,
    )

    def predict(latents: Tensor, sigmas: Tensor, dropped: Tensor, labels: Tensor) -> Tensor:
        """The velocity `[B, C, h, w]`."""
        labels = labels.masked_fill(dropped, NO_CLASS)
        return model(latents, timesteps_of(sigmas), labels, return_dict=False)[0].float()

    def sample(path: Path) -> None:
        if vae is not None:
            shape = transformer.config.in_channels, *[transformer.config.sample_size] * 2
            noise = sample_noise((len(labels_shown), *shape), config.seed, accelerator.device)
            both = partial(predict, labels=labels_shown.repeat(2))
            save_guided_samples(path, config, accelerator, model, vae, both, noise)

    def save(folder: Path) -> None:
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            save_parts(folder, copy_with_weights(transformer, state), vae, class_names, config.flow_shift)

    loop = TrainingLoop(config, accelerator, [model], [optimizer], save=save, sample=sample, options=options)
    for batch in loop.run(batches):
        latents = batch["latents"].float()
        noisy, sigmas, target = noisy_batch(latents, config.flow_shift, config.logit_mean, config.logit_std)
        dropped = torch.rand(len(latents), device=accelerator.device) < config.class_dropout
        with accelerator.accumulate(model):
            velocity = predict(noisy, sigmas, dropped, batch["class_labels"])
            loss = velocity_errors(velocity, target, sigmas, config.loss_weighting, config.snr_gamma).mean()
            loop.backward(loss)
            loop.update()
        loop.report(images=len(latents), loss=loss)


def save_parts(
    folder: Path, transformer: Any, vae: nn.Module | None, class_names: list[str], flow_shift: float
) -> None:
    """Save a DiTPipeline that diffusers alone can load, or the transformer where there is no autoencoder."""
    if vae is None:
        transformer.save_pretrained(folder / "transformer")
        return
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    )
    pipe = DiTPipeline(transformer, cast(Any, vae), scheduler)
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


def class_images(data: DiTDataOptions) -> tuple[Images, list[str]]:
    """Square images whose `text` is the name of their class, and the names in order.

    Raises:
        ValueError: there are no images, or images without a class.
    """
    images = load_images(data, [(data.resolution, data.resolution)], captions="optional")
    for index, name in enumerate(images.names):
        if isinstance(images.source, FolderSource):
            images.captions[index] = name.split("/")[0] if "/" in name else ""
        if not images.captions[index]:
            raise ValueError(
                f"`data` must say the class of each image, by its sub-folder or by `caption_column`, but {name!r} has"
                " none. Move or remove it."
            )
    return images, sorted(set(images.captions))


def make_dit(model: DiTModelOptions, latents: Tensor) -> DiTTransformer2DModel:
    """A new DiT for latents like these, `[C, h, h]`; as in its paper each block begins as the identity.

    Raises:
        ValueError: where patches do not fill the latents.
    """
    channels, size, _ = latents.shape
    if model.patch_size < 1 or size % model.patch_size:
        raise ValueError(f"`patch_size` must divide the latents' side {size}, got {model.patch_size}. Use 1.")
    transformer = DiTTransformer2DModel(
        num_attention_heads=model.num_attention_heads,
        attention_head_dim=model.attention_head_dim,
        in_channels=channels,
        out_channels=channels,
        num_layers=model.num_layers,
        sample_size=size,
        patch_size=model.patch_size,
    )
    blocks = transformer.transformer_blocks
    for layer in (*(block.norm1.linear for block in blocks), transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in blocks:
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    return transformer


def run(config: DiTTrainingConfig, data: DiTDataOptions, model: DiTModelOptions) -> None:
    """Train a new DiT on images with classes: what `examples/train_dc_ae_dit.py` does."""
    device = make_accelerator(config).device
    set_seed(config.seed)
    vae = load_autoencoder(model.vae, model.vae_subfolder).to(device).eval()
    images, class_names = class_images(data)

    def encode(item: dict[str, Any]) -> dict[str, Tensor]:
        return {"latents": encode_images(vae, item["pixel_values"][None].to(device))[0]}

    def with_labels(items: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(items) | {"class_labels": torch.tensor([class_names.index(item["text"]) for item in items])}

    cache = data.cache_dir or str(Path(config.output_dir) / "cache")
    dataset = fill_cache(images, cache, encode, {"vae": model_digest(vae)})
    batches = make_loader(dataset, data.batch_size, config.seed, data.num_workers, with_labels)
    train(config, batches, make_dit(model, dataset[0]["latents"]), class_names, vae, options=(data, model))
