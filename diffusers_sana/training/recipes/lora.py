"""Training of a LoRA for Sana on a few images of a thing or a style (LoRA, arXiv 2106.09685; DreamBooth, 2208.12242).

The base may have 4-bit weights (QLoRA, arXiv 2305.14314). Images of the class beside those of the thing keep the base
from forgetting the class.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffusers_sana.files import IMAGE_SUFFIXES, atomic_write, model_identity
from diffusers_sana.schedulers import trigflow
from diffusers_sana.training.data.batches import Batches, bucket_sizes, make_loader
from diffusers_sana.training.data.images import ImageFolder, Images
from diffusers_sana.training.loop import make_accelerator
from diffusers_sana.training.objectives.flow_matching import noisy_batch, velocity_errors
from diffusers_sana.training.objectives.trigflow_distillation import weighted_loss
from diffusers_sana.training.recipes.adapter import check_flow_shift, fit_adapter, load_base, quantize_base
from diffusers_sana.training.recipes.consistency import guidance_scales, tangent_of
from diffusers_sana.training.recipes.sana_options import LoraDataOptions, LoraModelOptions, LoraTrainingConfig
from diffusers_sana.training.recipes.text_to_image import (
    Encoders,
    Prompt,
    SanaInputs,
    bucketed_images,
)


RECORD = "diffusers_sana"  # the key under which a class image says what it was made from


def train(
    config: LoraTrainingConfig,
    batches: Batches,
    transformer: Any,
    vae: nn.Module | None = None,
    samples: dict[str, Tensor] | None = None,
    options: tuple[Any, ...] = (),
) -> None:
    """Train an adapter for `transformer`, which keeps its own weights; saved in `config.output_dir/model`.

    Args:
        config: a LoraTrainingConfig.
        batches: see `Batches`. A batch holds scaled `latents` `[B, C, h, w]`,
            `prompt_embeds` `[B, L, D]` and `prompt_attention_mask` `[B, L]`, and may hold `loss_weight` `[B]`.
        transformer: a SanaTransformer2DModel, of Sana or SANA-Sprint, dense or quantized, without adapters. Afterwards
            it has the trained one.
        vae: an AutoencoderDC. Sample grids need it.
        samples: `prompt_embeds` and `prompt_attention_mask` of the sample grids; default: those of the first batch.
        options: groups of options for data and models, that checkpoints record; see `TrainingLoop`.
    """
    is_sprint = bool(transformer.config.get("guidance_embeds"))
    check_objective(config, is_sprint)

    def terms(accelerator: Accelerator, model: nn.Module, latents: Tensor, prompt: Prompt, batch: dict) -> dict:
        weights = batch.get("loss_weight", 1.0)
        if is_sprint:
            return {"loss": consistency_loss(config, accelerator, model, latents, prompt, weights)}
        return {"loss": flow_loss(config, model, latents, prompt, weights)}

    fit_adapter(config, batches, transformer, terms, vae, samples, options)


def check_objective(config: LoraTrainingConfig, is_sprint: bool) -> None:
    """Raise a ValueError for settings that the objective of the transformer cannot use."""
    if not is_sprint:
        check_flow_shift(config)
    if is_sprint and (config.caption_dropout or config.loss_weighting != "none"):
        raise ValueError(
            f"`caption_dropout` must be 0 and `loss_weighting` 'none' for SANA-Sprint, got {config.caption_dropout} "
            f"and {config.loss_weighting!r}: it has no empty prompt, and weights its angles itself. Leave both out."
        )


def flow_loss(
    config: LoraTrainingConfig,
    model: nn.Module,
    latents: Tensor,
    prompt: Prompt,
    weights: Tensor | float,
) -> Tensor:
    """Flow matching: the weighted mean of the velocities' squared errors."""
    shift = cast(float, config.flow_shift)
    noisy, sigmas, target = noisy_batch(latents, shift, config.logit_mean, config.logit_std)
    dropped = torch.rand(len(latents), device=latents.device) < config.caption_dropout
    velocity = model(noisy, sigmas, prompt, dropped)
    errors = velocity_errors(velocity, target, sigmas, config.loss_weighting, config.snr_gamma)
    return (errors * weights).mean()


def consistency_loss(
    config: LoraTrainingConfig,
    accelerator: Accelerator,
    model: nn.Module,
    latents: Tensor,
    prompt: Prompt,
    weights: Tensor | float,
) -> Tensor:
    """Consistency training of a SANA-Sprint (sCM, arXiv 2410.11081, section 4): the path is that of the images.

    Distillation takes dx_t / dt from a teacher. Here it is that of the mixture, cos(t) noise - sin(t) z, whose mean
    over all images that x_t may come from is that of the path. So no teacher is needed: the student learns the images.
    """
    count, device = len(latents), latents.device
    angles = trigflow.sample_angles(count, config.angle_mean, config.angle_std, config.sigma_data, device)
    noise = torch.randn_like(latents)
    noisy = trigflow.mix(latents, noise, angles)
    direction = trigflow.mix(noise, -latents, angles)
    guidance = guidance_scales(config, count, device)
    tangent = tangent_of(config, accelerator, model, noisy, angles, guidance, prompt, direction)
    prediction, log_variance = model(noisy, angles, guidance, prompt)
    return weighted_loss(prediction, prediction.detach() + tangent, log_variance, weights)


def run(config: LoraTrainingConfig, data: LoraDataOptions, model: LoraModelOptions) -> None:
    """Train on a folder of images for a pipeline: what `examples/train_sana_lora.py` does."""
    train(config, *prepare(config, data, model), options=(data, model))


def prepare(
    config: LoraTrainingConfig, data: LoraDataOptions, model: LoraModelOptions
) -> tuple[Callable, Any, nn.Module, dict[str, Tensor] | None]:
    """Cached batches, transformer, autoencoder and prompts of the sample grids, as `train` takes them.

    Sets `config.flow_shift`, unless given, and for SANA-Sprint `config.sigma_data`. The text encoder is used
    here only, and freed afterwards.
    """
    device = make_accelerator(config).device
    set_seed(config.seed)
    pipe = load_base(config, model.pretrained, device)
    is_sprint = bool(pipe.transformer.config.get("guidance_embeds"))
    check_objective(config, is_sprint)
    if is_sprint:
        config.sigma_data = pipe.scheduler.config.sigma_data
    inputs = SanaInputs(config, device, Encoders.of(pipe))
    cache = Path(data.cache_dir or Path(config.output_dir) / "cache")
    instance = with_prompt(bucketed_images(data, captions="optional"), data.instance_prompt)
    dataset: Any = inputs.cache(instance, str(cache))
    if data.class_prompt:
        folder = Path(data.class_data or Path(config.output_dir) / "class")
        with PartialState().main_process_first():
            generate_class_images(pipe, config, data, model, folder)
        prior = captioned_folder(str(folder), bucket_sizes(data.resolution), data.class_prompt)
        dataset = WithPrior(dataset, inputs.cache(prior, str(cache / "class")), data.prior_weight)
    samples = inputs.encode_samples(config.sample_prompts)
    quantize_base(pipe.transformer, model)
    batches = make_loader(dataset, data.batch_size, config.seed, data.num_workers)
    return batches, pipe.transformer, pipe.vae, samples


def generate_class_images(
    pipe: Callable[..., Any],
    config: LoraTrainingConfig,
    data: LoraDataOptions,
    model: LoraModelOptions,
    folder: Path,
) -> None:
    """Generate images of `data.class_prompt` with the base model until `folder` has `data.num_class_images`.

    Images of this function record in their metadata what they were made from. Those of another prompt, size or model
    are made again or removed; images that somebody else has put into the folder stay, and count.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"prompt": data.class_prompt, "resolution": data.resolution, "dtype": config.mixed_precision}
    settings |= {"model": model.pretrained, "model_files": model_identity(model.pretrained), "seed": config.seed}
    record = json.dumps(settings, sort_keys=True)
    found = {path: _record(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
    num_missing = data.num_class_images - sum(other is None for other in found.values())
    wanted = [folder / f"class_{index:05d}.png" for index in range(max(0, num_missing))]
    for path, other in found.items():
        if other is not None and (other != record or path not in wanted):
            path.unlink()
    for index, path in enumerate(wanted):
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(config.seed + index)
        size = {"height": data.resolution, "width": data.resolution}
        info = PngInfo()
        info.add_itxt(RECORD, record)
        with atomic_write(path) as temporary:
            pipe(data.class_prompt, generator=generator, **size).images[0].save(temporary, pnginfo=info)


def _record(path: Path) -> str | None:
    """What an image of `generate_class_images` was made from; None for others."""
    with Image.open(path) as image:
        return image.info.get(RECORD)


class WithPrior(Dataset):
    """As many items of the class as of the instance, each with its `loss_weight`; the smaller set is repeated.

    Args:
        instance: items to learn, with `sizes_of_items`.
        prior: items of what is not to be forgotten.
        weight: of the loss on `prior`; that on `instance` has 1.
    """

    def __init__(self, instance: Any, prior: Any, weight: float):
        self.parts = ((instance, 1.0), (prior, weight))
        self.sizes_of_items = [self._find(index)[0].sizes_of_items[self._find(index)[1]] for index in range(len(self))]

    def _find(self, index: int) -> tuple[Any, int, float]:
        items, weight = self.parts[index % 2]
        return items, index // 2 % len(items), weight

    def __len__(self) -> int:
        return 2 * max(len(items) for items, _ in self.parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        items, at, weight = self._find(index)
        return items[at] | {"loss_weight": torch.tensor(weight)}


def captioned_folder(folder: str, sizes: list[tuple[int, int]], prompt: str) -> Images:
    """The images of a folder, with captions from its files, or `prompt` where there is none."""
    return with_prompt(ImageFolder(folder, sizes, captions="optional"), prompt)


def with_prompt(images: Images, prompt: str) -> Images:
    """The images, of which those without a caption have `prompt`.

    Raises:
        ValueError: there are such images, and `prompt` is empty.
    """
    for index, name in enumerate(images.names):
        images.captions[index] = images.captions[index] or prompt
        if not images.captions[index]:
            raise ValueError(f"`instance_prompt` must be given for images without a caption, such as {name}, got ''.")
    return images
