"""Train a LoRA for Sana on a folder of pictures, in DreamBooth's manner (arXiv 2106.09685, 2208.12242).

    python examples/train_sana_lora.py --data dog --instance_prompt "a photo of sks dog" --pretrained my/sana-pipeline

Captions come from `metadata.jsonl` (lines `{"file_name": ..., "text": ...}`) or from `NAME.txt` beside `NAME.png`;
images without one have `--instance_prompt`. `--data` may also be WebDataset tars or a dataset of the Hub.
`--quantize int4` trains on a base of 4 bits (QLoRA, arXiv 2305.14314).
Latents and text vectors are computed once. `output_dir/model/pytorch_lora_weights.safetensors` is the result: for
`pipe.load_lora_weights`, here and in diffusers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import set_seed
from peft import get_peft_model_state_dict
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from diffusers_sana import SanaPipeline, SVDQuantConfig, quantize
from diffusers_sana.files import IMAGE_SUFFIXES, atomic_write, model_identity
from diffusers_sana.prompts.training_prompts import complex_human_instruction, encode_tokens, tokenize_prompts
from diffusers_sana.training.config import check_choice, option, parse_config, run_script
from diffusers_sana.training.data.batches import Batches, bucket_sizes, collate, make_loader
from diffusers_sana.training.data.images import load_images
from diffusers_sana.training.data.latent_cache import fill_cache, model_digest, tokenizer_digest
from diffusers_sana.training.data.sources import ImageDataConfig
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.flow_matching import (
    ConditionedTransformer,
    interpolate,
    sample_euler,
    sample_sigmas,
    velocity_target,
)
from diffusers_sana.training.optimizers import make_adamw
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.lora import WithPrior, add_adapter, captioned_folder, with_prompt


RECORD = "diffusers_sana"  # what a class image says of itself
MIX_FFN = ("conv_inverted", "conv_point")  # its two 1x1 convolutions


@dataclass(kw_only=True)
class LoraTrainingConfig(ImageDataConfig):
    """Settings of a LoRA training; rank, layers and optimiser are those of diffusers' DreamBooth script for Sana."""

    output_dir: str = option("outputs/sana-lora", "folder for checkpoints, samples, log and result", changeable=True)
    instance_prompt: str = option("", "caption of pictures that have none (command line only)")
    class_prompt: str = option("", "what the base model must not forget, such as `a dog` (command line only)")
    class_data: str = option(
        "", "folder of pictures of the class; default: in `output_dir` (command line only)", changeable=True
    )
    num_class_images: int = option(100, "the base model draws what `class_data` lacks of these (command line only)")
    prior_weight: float = option(
        1.0, "weight of the loss on pictures of the class (command line only)", changeable=True
    )
    pretrained: str = option("", "SanaPipeline folder or repository, also a quantized one (command line only)")
    quantize: str = option("no", "`no`, or `int4` or `nvfp4`: make the base 4 bits first (command line only)")
    quantize_rank: int = option(32, "rank of the 16-bit branch beside the 4 bits (command line only)")
    cache_dir: str = option(
        "", "folder of latents and text vectors; default: in `output_dir` (command line only)", changeable=True
    )
    batch_size: int = option(4, "pictures a batch and process (command line only)")
    num_workers: int = option(0, "processes that read the cache (command line only)", changeable=True)
    resolution: int = option(512, "side of the square whose area the buckets have (command line only)")
    use_instruction: bool = option(True, "put the complex human instruction before prompts, as the pipeline does")
    max_sequence_length: int = option(300, "text vectors the transformer sees at most")
    rank: int = option(4, "rank of the adapter's matrices")
    lora_alpha: int | None = option(None, "the adapter counts lora_alpha / rank; None: as much as rank")
    lora_dropout: float = option(0.0, "share of the adapter's inputs that is dropped", changeable=True)
    target_modules: tuple[str, ...] = option(
        ("to_q", "to_k", "to_v"), "layers that get an adapter, by the ends of names"
    )
    mix_ffn: bool = option(False, f"also the 1x1 convolutions of the Mix-FFN: {', '.join(MIX_FFN)}")
    use_dora: bool = option(False, "learn the length of each weight apart from its direction (arXiv 2402.09353)")
    max_steps: int = option(500, "optimiser steps", changeable=True)
    learning_rate: float | None = option(1e-4, "peak learning rate", changeable=True)
    betas: tuple[float, float] | None = option((0.9, 0.999), "AdamW betas", changeable=True)
    weight_decay: float | None = option(1e-4, "AdamW weight decay", changeable=True)
    flow_shift: float | None = option(
        None, "shift of the noise levels; None: that of the pipeline's scheduler", changeable=True
    )
    logit_mean: float = option(0.0, "mean of the logit-normal noise levels before the shift", changeable=True)
    logit_std: float = option(
        1.0, "standard deviation of the logit-normal noise levels before the shift", changeable=True
    )
    caption_dropout: float = option(0.0, "share of prompts replaced by the empty one", changeable=True)
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", changeable=True
    )
    sample_prompts: tuple[str, ...] = option(
        (), "prompts of the sample grids; default: those of the first batch", changeable=True
    )
    sample_steps: int = option(20, "Euler steps of the sample grids", changeable=True)
    sample_guidance: float = option(4.5, "guidance scale of the sample grids", changeable=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("quantize", self.quantize, ("no", "int4", "nvfp4"))
        if self.rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {self.rank}. 4 to 32 are usual.")


def train(
    config: LoraTrainingConfig,
    batches: Batches,
    transformer: nn.Module,
    vae: nn.Module | None = None,
    samples: dict[str, Tensor] | None = None,
) -> None:
    """Train an adapter for `transformer`, which keeps its own weights; saved in `config.output_dir/model`.

    Args:
        config: the settings.
        batches: iterable of batches, or a function from the number of batches already used to the iterable of those
            that follow, which makes a resumed run exact. A batch holds scaled `latents` `[B, C, h, w]`,
            `prompt_embeds` `[B, L, D]` and `prompt_attention_mask` `[B, L]`, and may hold `loss_weight` `[B]`.
        transformer: a SanaTransformer2DModel, dense or quantized, without adapters. Afterwards it has the trained one.
        vae: an AutoencoderDC. Sample grids need it.
        samples: `prompt_embeds` and `prompt_attention_mask` of the sample grids; default: those of the first batch.
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
    if vae is not None:
        vae.to(accelerator.device).eval().requires_grad_(False)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if config.compile:
        for block in transformer.transformer_blocks:
            block.compile()
    model = ConditionedTransformer(transformer).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = make_adamw(trained.values(), config.learning_rate, config.betas, config.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    shown: dict[str, Tensor] = {}  # what the sample grids show

    def sample(path: Path) -> None:
        if vae is None:
            return
        noise = shown["noise"]
        twice = tuple(torch.cat([shown[name]] * 2) for name in ("prompt_embeds", "prompt_attention_mask"))
        dropped = torch.arange(2 * len(noise), device=noise.device) >= len(noise)

        def guided(latents: Tensor, sigmas: Tensor) -> Tensor:
            velocity = model(latents.repeat(2, 1, 1, 1), sigmas.repeat(2), twice, dropped).float()
            full, empty = velocity.chunk(2)
            return empty + config.sample_guidance * (full - empty)

        model.eval()
        latents = sample_euler(guided, noise, config.sample_steps, config.flow_shift)
        model.train()
        with torch.no_grad():
            images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        if accelerator.is_main_process:
            save_image_grid(images, path)

    def save(folder: Path) -> None:
        if accelerator.is_main_process:
            SanaPipeline.save_lora_weights(
                folder,
                transformer_lora_layers=get_peft_model_state_dict(transformer),
                transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
            )

    # The base does not change, and may be large.
    loop = TrainingLoop(config, accelerator, [model], [optimizer], save=save, sample=sample, keep_frozen=False)
    for batch in loop.run(batches):
        latents = batch["latents"].float()
        prompt = batch["prompt_embeds"].float(), batch["prompt_attention_mask"]
        if not shown:
            chosen = samples or {"prompt_embeds": prompt[0][:8], "prompt_attention_mask": prompt[1][:8]}
            shape = len(chosen["prompt_embeds"]), *latents.shape[1:]
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed))
            shown |= {name: tensor.to(latents.device) for name, tensor in (chosen | {"noise": noise}).items()}
        noise = torch.randn_like(latents)
        sigmas = sample_sigmas(
            len(latents), config.flow_shift, config.logit_mean, config.logit_std, accelerator.device
        )
        dropped = torch.rand(len(latents), device=accelerator.device) < config.caption_dropout
        with accelerator.accumulate(model):
            velocity = model(interpolate(latents, noise, sigmas), sigmas, prompt, dropped)
            errors = F.mse_loss(velocity.float(), velocity_target(latents, noise), reduction="none").mean((1, 2, 3))
            loss = (errors * batch.get("loss_weight", 1.0)).mean()
            accelerator.backward(loss * loop.weight)
            if accelerator.sync_gradients and config.max_grad_norm:
                accelerator.clip_grad_norm_(trained.values(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        loop.report(images=len(latents), loss=loss)


def generate_class_images(pipe: Callable[..., Any], config: LoraTrainingConfig, folder: Path) -> None:
    """Generate images of `config.class_prompt` with the base model until `folder` has `config.num_class_images`.

    Images of this function say in themselves what they were made from. Those of another prompt, size or model are
    made again or removed; images that somebody else has put into the folder stay, and count.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"prompt": config.class_prompt, "resolution": config.resolution, "dtype": config.mixed_precision}
    settings |= {"model": config.pretrained, "model_files": model_identity(config.pretrained), "seed": config.seed}
    record = json.dumps(settings, sort_keys=True)
    found = {path: _record(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
    num_missing = config.num_class_images - sum(other is None for other in found.values())
    wanted = [folder / f"class_{index:05d}.png" for index in range(max(0, num_missing))]
    for path, other in found.items():
        if other is not None and (other != record or path not in wanted):
            path.unlink()
    for index, path in enumerate(wanted):
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(config.seed + index)
        size = {"height": config.resolution, "width": config.resolution}
        info = PngInfo()
        info.add_itxt(RECORD, record)
        with atomic_write(path) as temporary:
            pipe(config.class_prompt, generator=generator, **size).images[0].save(temporary, pnginfo=info)


def _record(path: Path) -> str | None:
    """What an image of `generate_class_images` was made from; None for others."""
    with Image.open(path) as image:
        return image.info.get(RECORD)


def prepare(config: LoraTrainingConfig) -> tuple[Callable, nn.Module, nn.Module, dict[str, Tensor] | None]:
    """Cached batches, transformer, autoencoder and prompts of the sample grids, as `train` takes them.

    Sets `config.flow_shift`, unless given. The text encoder is used here only, and gone afterwards.
    """
    device = make_accelerator(config).device
    set_seed(config.seed)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    dtypes = {"vae": torch.float32, "default": dtype}
    pipe = SanaPipeline.from_pretrained(config.pretrained, torch_dtype=dtypes).to(device)
    if config.flow_shift is None:
        config.flow_shift = pipe.scheduler.config.flow_shift
    instruction = complex_human_instruction() if config.use_instruction else ""
    cache, sizes = Path(config.cache_dir or Path(config.output_dir) / "cache"), bucket_sizes(config.resolution)

    @torch.no_grad()
    def encode_prompt(prompt: str) -> Tensor:
        """Text vectors `[L, D]`."""
        tokens = tokenize_prompts(pipe.tokenizer, [prompt], config.max_sequence_length, instruction)
        return encode_tokens(pipe.text_encoder, tokens.to(device))[0][0]

    @torch.no_grad()
    def encode(item: dict[str, Any]) -> dict[str, Tensor]:
        """What the cache keeps of a picture."""
        latents = pipe.vae.encode(item["pixel_values"][None].to(device)).latent[0] * pipe.vae.config.scaling_factor
        return {"latents": latents, "prompt_embeds": encode_prompt(item["text"])}

    settings = {
        "vae": model_digest(pipe.vae),
        "text_encoder": model_digest(pipe.text_encoder),
        "tokenizer": tokenizer_digest(pipe.tokenizer),
        "instruction": instruction,
        "max_sequence_length": config.max_sequence_length,
    }
    instance = with_prompt(load_images(config, sizes, captions="optional"), config.instance_prompt)
    dataset: Any = fill_cache(instance, str(cache), encode, settings)
    if config.class_prompt:
        folder = Path(config.class_data or Path(config.output_dir) / "class")
        with PartialState().main_process_first():
            generate_class_images(pipe, config, folder)
        prior = captioned_folder(str(folder), sizes, config.class_prompt)
        dataset = WithPrior(dataset, fill_cache(prior, str(cache / "class"), encode, settings), config.prior_weight)
    samples = [{"prompt_embeds": encode_prompt(prompt).cpu()} for prompt in config.sample_prompts]
    if config.quantize != "no":
        quantize(pipe.transformer, SVDQuantConfig(precision=config.quantize, rank=config.quantize_rank))
    batches = make_loader(dataset, config.batch_size, config.seed, config.num_workers)
    return batches, pipe.transformer, pipe.vae, collate(samples) if samples else None


def main(argv: list[str] | None = None) -> None:
    """The command line: a folder of pictures, and the pipeline that is to learn from it."""
    config = parse_config(LoraTrainingConfig, argv, description=__doc__)
    if not config.pretrained:
        raise ValueError("`pretrained` must be a SanaPipeline folder or repository, got ''. Pass --pretrained.")
    train(config, *prepare(config))


if __name__ == "__main__":
    run_script(main)
