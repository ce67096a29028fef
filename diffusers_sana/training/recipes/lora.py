"""Training of a LoRA for Sana on a few images of a thing or a style (LoRA, arXiv 2106.09685; DreamBooth, 2208.12242).

The base may have 4-bit weights (QLoRA, arXiv 2305.14314). Images of the class beside those of the thing keep the base
from forgetting the class.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import set_seed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffusers_sana._compat import warn_if_untested
from diffusers_sana.files import IMAGE_SUFFIXES, atomic_write, model_identity
from diffusers_sana.pipelines.pipeline_sana import SanaPipeline
from diffusers_sana.quantizers.svdquant.api import quantize
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.training.data.batches import Batches, bucket_sizes, collate, make_loader
from diffusers_sana.training.data.images import ImageFolder, Images, load_images
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.flow_matching import ConditionedTransformer, noisy_batch
from diffusers_sana.training.optimizers import make_adamw
from diffusers_sana.training.recipes.options import LoraDataOptions, LoraModelOptions, LoraTrainingConfig
from diffusers_sana.training.recipes.text_to_image import (
    Encoders,
    SanaInputs,
    doubled,
    first_samples,
    prepare_blocks,
    save_guided_samples,
)


warn_if_untested("peft")

RECORD = "diffusers_sana"  # the key under which a class image says what it was made from
MIX_FFN = ("conv_inverted", "conv_point")  # its two 1x1 convolutions


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
        transformer: a SanaTransformer2DModel, dense or quantized, without adapters. Afterwards it has the trained one.
        vae: an AutoencoderDC. Sample grids need it.
        samples: `prompt_embeds` and `prompt_attention_mask` of the sample grids; default: those of the first batch.
        options: groups of options for data and models, that checkpoints record; see `TrainingLoop`.
    """
    if config.flow_shift is None:
        raise ValueError("`flow_shift` must be a number in `train`, got None. Pass that of the pipeline's scheduler.")
    accelerator = make_accelerator(config)
    set_seed(config.seed)
    add_adapter(
        transformer,
        target_modules=[*config.target_modules, *(MIX_FFN if config.mix_ffn else ())],
        r=config.rank,
        lora_alpha=config.lora_alpha or config.rank,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
    )
    set_seed(config.seed, device_specific=True)
    inputs = SanaInputs(config, accelerator.device, Encoders(vae=vae))
    prepare_blocks(config, transformer)
    model = ConditionedTransformer(transformer).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_adamw(trained, config.learning_rate, config.betas, config.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    shown: dict[str, Any] = {}  # what the sample grids show: prompts and noise

    def sample(path: Path) -> None:
        if vae is not None:
            predict = partial(model, prompt=doubled(shown["prompt"]))
            save_guided_samples(path, config, accelerator, model, vae, predict, shown["noise"])

    def save(folder: Path) -> None:
        if accelerator.is_main_process:
            SanaPipeline.save_lora_weights(
                folder,
                transformer_lora_layers=get_peft_model_state_dict(transformer),
                transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
            )

    loop = TrainingLoop(
        config,
        accelerator,
        [model],
        [optimizer],
        save=save,
        sample=sample,
        keep_frozen=False,  # the base does not change, and may be large
        options=options,
    )
    for batch in loop.run(batches):
        latents, prompt = inputs.latents(batch), inputs.prompts(batch)
        shown = shown or first_samples(config, latents, prompt, inputs.prompts(samples) if samples else None)
        noisy, sigmas, target = noisy_batch(latents, config.flow_shift, config.logit_mean, config.logit_std)
        dropped = torch.rand(len(latents), device=accelerator.device) < config.caption_dropout
        with accelerator.accumulate(model):
            velocity = model(noisy, sigmas, prompt, dropped).float()
            errors = F.mse_loss(velocity, target, reduction="none").mean((1, 2, 3))
            loss = (errors * batch.get("loss_weight", 1.0)).mean()
            loop.backward(loss)
            loop.update()
        loop.report(images=len(latents), loss=loss)


def run(config: LoraTrainingConfig, data: LoraDataOptions, model: LoraModelOptions) -> None:
    """Train on a folder of images for a pipeline: what `examples/train_sana_lora.py` does."""
    train(config, *prepare(config, data, model), options=(data, model))


def prepare(
    config: LoraTrainingConfig, data: LoraDataOptions, model: LoraModelOptions
) -> tuple[Callable, Any, nn.Module, dict[str, Tensor] | None]:
    """Cached batches, transformer, autoencoder and prompts of the sample grids, as `train` takes them.

    Sets `config.flow_shift`, unless given. The text encoder is used here only, and freed afterwards.
    """
    device = make_accelerator(config).device
    set_seed(config.seed)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    dtypes = {"vae": torch.float32, "default": dtype}
    pipe = SanaPipeline.from_pretrained(model.pretrained, dtype=dtypes).to(device)
    if config.flow_shift is None:
        config.flow_shift = pipe.scheduler.config.flow_shift
    inputs = SanaInputs(config, device, Encoders.of(pipe))
    cache, sizes = Path(data.cache_dir or Path(config.output_dir) / "cache"), bucket_sizes(data.resolution)
    instance = with_prompt(load_images(data, sizes, captions="optional"), data.instance_prompt)
    dataset: Any = inputs.cache(instance, str(cache))
    if data.class_prompt:
        folder = Path(data.class_data or Path(config.output_dir) / "class")
        with PartialState().main_process_first():
            generate_class_images(pipe, config, data, model, folder)
        prior = captioned_folder(str(folder), sizes, data.class_prompt)
        dataset = WithPrior(dataset, inputs.cache(prior, str(cache / "class")), data.prior_weight)
    samples = [{"prompt_embeds": inputs.encode_prompt(prompt).cpu()} for prompt in config.sample_prompts]
    if model.quantize != "no":
        quantize(pipe.transformer, SVDQuantConfig(precision=model.quantize, rank=model.quantize_rank))
    batches = make_loader(dataset, data.batch_size, config.seed, data.num_workers)
    return batches, pipe.transformer, pipe.vae, collate(samples) if samples else None


def generate_class_images(
    pipe: Callable[..., Any],
    config: LoraTrainingConfig,
    data: LoraDataOptions,
    model: LoraModelOptions,
    folder: Path,
) -> None:
    """Generate images of `data.class_prompt` with the base model until `folder` has `data.num_class_images`.

    Images of this function say in themselves what they were made from. Those of another prompt, size or model are
    made again or removed; images that somebody else has put into the folder stay, and count.
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
    """As many items of the class as of the instance, each with its `loss_weight`; the fewer ones are repeated.

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


def add_adapter(transformer: ModelMixin, target_modules: Sequence[str], **lora_config: Any) -> None:
    """Freeze `transformer` and put a LoRA that trains, in fp32, beside its layers.

    Args:
        transformer: a diffusers model, dense or quantized.
        target_modules: names of layers, or their ends.
        **lora_config: further arguments of PEFT's `LoraConfig`.

    Raises:
        ValueError: a target names no layer.
    """
    names = [name for name, _ in transformer.named_modules()]
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names if "attn" in name or ".ff." in name})
            raise ValueError(f"`target_modules` must name layers, got {target!r}. Layers of the blocks: {ends}.")
    transformer.requires_grad_(False)
    adapter = LoraConfig(init_lora_weights="gaussian", target_modules=list(target_modules), **lora_config)
    transformer.add_adapter(adapter)
    cast_training_params(transformer, torch.float32)  # in bf16 small steps would be rounded away
