"""Train a Sana text-to-image transformer by flow matching (arXiv 2410.10629).

    python examples/train_sana.py --data photos --pretrained some/sana-pipeline --output_dir outputs/sana

The folder holds images and their captions, in any layout that docs/data.md lists; `--data` may also be WebDataset tars
or a dataset of the Hub. The parts come from a pipeline; `--transformer_config` begins a new transformer,
`--sample_size` and `--interpolation_scale` make the old one ready for another resolution, `--cache_dir` computes
latents and text vectors once.
Another script calls `train(config, batches, transformer, ...)` with any iterable of batches. Under `output_dir/model`
the result is a SanaPipeline folder, or the trained parts alone when the other parts are not given.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn

from diffusers_sana import FlowDPMSolverScheduler, SanaPipeline, SanaTransformer2DModel
from diffusers_sana.files import read_json
from diffusers_sana.prompts.training_prompts import complex_human_instruction, encode_tokens, tokenize_prompts
from diffusers_sana.training.config import option, parse_config, run_script
from diffusers_sana.training.data.batches import Batches, bucket_sizes, make_loader
from diffusers_sana.training.data.captions import SampledCaptions, embeds_name
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
from diffusers_sana.training.optimizers import make_optimizer
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.sana import with_native_size
from diffusers_sana.training.state_files import copy_with_weights, sub_state


@dataclass(kw_only=True)
class SanaTrainingConfig(ImageDataConfig):
    """Settings of a text-to-image training; the defaults are the paper's where it gives any."""

    output_dir: str = option("outputs/sana", "folder for checkpoints, samples, log and result", changeable=True)
    pretrained: str = option("", "SanaPipeline folder or repository that gives the parts (command line only)")
    transformer_config: str = option("", "config.json of a new transformer (command line only)")
    cache_dir: str = option("", "folder to keep latents and text vectors in (command line only)", changeable=True)
    batch_size: int = option(64, "images a batch and process (command line only)")
    num_workers: int = option(4, "processes that load images (command line only)", changeable=True)
    resolution: int = option(512, "side of the square whose area the buckets have (command line only)")
    sample_size: int | None = option(None, "latent side the model is from now on for (command line only)")
    interpolation_scale: int | None = option(
        None, "give the model a positional table: 1 at 2048 pixels, 2 at 4096 (command line only)"
    )
    caption_weighting: str = option(
        "power",
        "`power` (released code) or `softmax` (paper) of the CLIP scores in captions.jsonl (command line only)",
        changeable=True,
    )
    caption_temperature: float = option(
        0.1, "the lower, the more the best caption is drawn (command line only)", changeable=True
    )
    caption_threshold: float = option(
        25.0, "CLIP score below which captions are not drawn (command line only)", changeable=True
    )
    optimizer: str = option("adamw", "`adamw`, or `adamw8bit` with a quarter of its memory (needs bitsandbytes)")
    learning_rate: float | None = option(1e-4, "peak learning rate", changeable=True)
    betas: tuple[float, float] | None = option((0.9, 0.999), "AdamW betas", changeable=True)
    weight_decay: float | None = option(0.0, "AdamW weight decay of matrices and kernels", changeable=True)
    warmup_steps: int = option(2000, "steps of linear warm-up", changeable=True)
    max_grad_norm: float = option(0.1, "clip the gradient norm; 0 does not clip", changeable=True)
    flow_shift: float = option(3.0, "shift of the noise levels; 6 for 4096 pixels", changeable=True)
    logit_mean: float = option(0.0, "mean of the logit-normal noise levels before the shift", changeable=True)
    logit_std: float = option(
        1.0, "standard deviation of the logit-normal noise levels before the shift", changeable=True
    )
    caption_dropout: float = option(0.1, "share of prompts replaced by the empty one, for guidance", changeable=True)
    max_sequence_length: int = option(300, "text vectors the transformer sees at most")
    use_instruction: bool = option(True, "put the complex human instruction before prompts, as the pipeline does")
    train_text_encoder: bool = option(False, "train the text encoder too; for small ones")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", changeable=True
    )
    sample_prompts: tuple[str, ...] = option(
        (), "prompts of the sample grids; default: those of the first batch", changeable=True
    )
    sample_steps: int = option(20, "Euler steps of the sample grids", changeable=True)
    sample_guidance: float = option(4.5, "guidance scale of the sample grids", changeable=True)


def train(
    config: SanaTrainingConfig,
    batches: Batches,
    transformer: nn.Module,
    text_encoder: nn.Module | None = None,
    tokenizer: Any = None,
    vae: nn.Module | None = None,
) -> None:
    """Train `transformer`, and `text_encoder` with `config.train_text_encoder`; saved in `config.output_dir/model`.

    Args:
        config: the settings.
        batches: iterable of batches, or a function from the number of batches already used to the iterable of those
            that follow, which makes a resumed run exact. A batch holds the images as `pixel_values`
            `[B, 3, H, W]` in [-1, 1], which need `vae`, or as scaled `latents` `[B, C, h, w]`; and the prompts as
            `text`, a list of B strings, which needs `text_encoder` and `tokenizer`, or as `prompt_embeds`
            `[B, L, D]` with `prompt_attention_mask` `[B, L]`.
        transformer: a SanaTransformer2DModel.
        text_encoder: a Gemma2Model.
        tokenizer: its tokenizer.
        vae: an AutoencoderDC; frozen. Sample grids need it.
    """
    if config.train_text_encoder and text_encoder is None:
        raise ValueError("`text_encoder` must be given to be trained, got None. Pass it and `tokenizer`.")
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    instruction = complex_human_instruction() if config.use_instruction else ""
    for frozen in (vae, None if config.train_text_encoder else text_encoder):
        if frozen is not None:
            frozen.to(accelerator.device).eval().requires_grad_(False)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if config.compile:
        for block in transformer.transformer_blocks:
            block.compile()
    model = ConditionedTransformer(transformer, text_encoder if config.train_text_encoder else None).train()
    optimizer = make_optimizer(
        config.optimizer, model.parameters(), config.learning_rate, config.betas, config.weight_decay
    )
    model, optimizer = accelerator.prepare(model, optimizer)

    def prepare_prompts(batch: dict[str, Any]) -> Any:
        """What `ConditionedTransformer` takes as `prompt`."""
        if "prompt_embeds" in batch and not config.train_text_encoder:
            return batch["prompt_embeds"].float(), batch["prompt_attention_mask"]
        if text_encoder is None or tokenizer is None:
            raise ValueError(
                "`text_encoder` and `tokenizer` must be given for batches of `text`, got None. Pass both."
            )
        tokens = tokenize_prompts(tokenizer, batch["text"], config.max_sequence_length, instruction)
        tokens = tokens.to(accelerator.device)
        if config.train_text_encoder:
            return tokens
        with torch.no_grad():
            embeds, mask = encode_tokens(text_encoder, tokens)
        return embeds.float(), mask

    def prepare_latents(batch: dict[str, Any]) -> Tensor:
        """Scaled latents, from the batch or from its images."""
        if "latents" in batch:
            return batch["latents"].float()
        if vae is None:
            raise ValueError("`vae` must be given for batches of `pixel_values`, got None. Pass it, or `latents`.")
        return encode_images(vae, batch["pixel_values"])

    shown: dict[str, Any] = {}  # what the sample grids show: a batch of prompts, each twice, and the noise

    def sample(path: Path) -> None:
        if vae is None:
            return
        prompt, noise = prepare_prompts(shown), shown["noise"]
        dropped = torch.arange(2 * len(noise), device=noise.device) >= len(noise)

        def predict(latents: Tensor, sigmas: Tensor) -> Tensor:
            """The velocity with guidance; the second of each prompt is dropped."""
            velocity = model(latents.repeat(2, 1, 1, 1), sigmas.repeat(2), prompt, dropped).float()
            guided, empty = velocity.chunk(2)
            return empty + config.sample_guidance * (guided - empty)

        model.eval()
        latents = sample_euler(predict, noise, config.sample_steps, config.flow_shift)
        model.train()
        with torch.no_grad():
            images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        if accelerator.is_main_process:
            save_image_grid(images, path)

    def save(folder: Path) -> None:
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            trained = copy_with_weights(transformer, sub_state(state, "transformer."))
            encoder = text_encoder
            if config.train_text_encoder:
                encoder = copy_with_weights(text_encoder, sub_state(state, "text_encoder."))
            save_parts(folder, trained, encoder, tokenizer, vae, config)

    loop = TrainingLoop(config, accelerator, [model], [optimizer], save=save, sample=sample)
    for batch in loop.run(batches):
        latents = prepare_latents(batch)
        shown = shown or sample_inputs(config, batch, latents)
        prompt = prepare_prompts(batch)
        noise = torch.randn_like(latents)
        sigmas = sample_sigmas(
            len(latents), config.flow_shift, config.logit_mean, config.logit_std, accelerator.device
        )
        dropped = torch.rand(len(latents), device=accelerator.device) < config.caption_dropout
        with accelerator.accumulate(model):
            velocity = model(interpolate(latents, noise, sigmas), sigmas, prompt, dropped)
            loss = F.mse_loss(velocity.float(), velocity_target(latents, noise))
            accelerator.backward(loss * loop.weight)
            if accelerator.sync_gradients and config.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        loop.report(images=len(latents), loss=loss)


@torch.no_grad()
def encode_images(vae: nn.Module, pixel_values: Tensor) -> Tensor:
    """Scaled latents `[B, C, h, w]` of images `[B, 3, H, W]` in [-1, 1]."""
    return vae.encode(pixel_values.to(vae.dtype)).latent.float() * vae.config.scaling_factor


def sample_inputs(
    config: SanaTrainingConfig, batch: dict[str, Any], latents: Tensor, count: int = 8
) -> dict[str, Any]:
    """A batch of prompts for the sample grids, each twice for guidance, and the noise they always start from."""
    inputs: dict[str, Any] = {}
    if config.sample_prompts or config.train_text_encoder or "prompt_embeds" not in batch:
        prompts = list(config.sample_prompts or batch["text"][:count])
        count = len(prompts)
        inputs["text"] = prompts * 2
    else:
        count = min(count, len(latents))
        for name in ("prompt_embeds", "prompt_attention_mask"):
            inputs[name] = torch.cat([batch[name][:count]] * 2)
    noise = torch.randn(count, *latents.shape[1:], generator=torch.Generator().manual_seed(config.seed))
    return inputs | {"noise": noise.to(latents.device)}


def save_parts(
    folder: Path,
    transformer: nn.Module,
    text_encoder: nn.Module | None,
    tokenizer: Any,
    vae: nn.Module | None,
    config: SanaTrainingConfig,
) -> None:
    """Save a whole pipeline when all parts are there, otherwise the trained parts in folders of a pipeline's names."""
    if text_encoder is not None and tokenizer is not None and vae is not None:
        scheduler = FlowDPMSolverScheduler(flow_shift=config.flow_shift)
        SanaPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)
        return
    transformer.save_pretrained(folder / "transformer")
    if config.train_text_encoder:
        text_encoder.save_pretrained(folder / "text_encoder")


def main(argv: list[str] | None = None) -> None:
    """The command line: a captioned image folder, and a pipeline to take the parts from."""
    config = parse_config(SanaTrainingConfig, argv, description=__doc__)
    if not config.pretrained:
        raise ValueError("`pretrained` must be a SanaPipeline folder or repository, got ''. Pass --pretrained.")
    device = make_accelerator(config).device
    set_seed(config.seed)
    pipeline = SanaPipeline.from_pretrained(config.pretrained)
    transformer, text_encoder, tokenizer, vae = (
        pipeline.components[name] for name in ("transformer", "text_encoder", "tokenizer", "vae")
    )
    if config.transformer_config:
        transformer = SanaTransformer2DModel.from_config(read_json(config.transformer_config))
    transformer = with_native_size(transformer, config.sample_size, config.interpolation_scale)
    if not config.train_text_encoder and config.mixed_precision == "bf16":
        text_encoder.to(torch.bfloat16)
    images = load_images(config, bucket_sizes(config.resolution))
    dataset: Any = images
    if config.cache_dir:
        vae.to(device)
        text_encoder.to(device)
        instruction = complex_human_instruction() if config.use_instruction else ""

        @torch.no_grad()
        def encode(item: dict[str, Any]) -> dict[str, Tensor]:
            """What the cache keeps of an item; text vectors only where the encoder will not change."""
            tensors = {"latents": encode_images(vae, item["pixel_values"][None].to(device))[0]}
            if not config.train_text_encoder:
                texts = item.get("texts", [item["text"]])
                names = [embeds_name(number) for number in range(len(texts))] if "texts" in item else ["prompt_embeds"]
                for name, text in zip(names, texts, strict=True):
                    tokens = tokenize_prompts(tokenizer, [text], config.max_sequence_length, instruction)
                    tensors[name] = encode_tokens(text_encoder, tokens.to(device))[0][0]
            return tensors

        settings = {
            "vae": model_digest(vae),
            "text_encoder": None if config.train_text_encoder else model_digest(text_encoder),
            "tokenizer": tokenizer_digest(tokenizer),
            "instruction": instruction,
            "max_sequence_length": config.max_sequence_length,
        }
        dataset = fill_cache(images, config.cache_dir, encode, settings)
    if images.choices is not None:
        sampling = (config.caption_weighting, config.caption_temperature, config.caption_threshold)
        dataset = SampledCaptions(dataset, images.choices, config.seed, *sampling)
    batches = make_loader(dataset, config.batch_size, config.seed, config.num_workers)
    train(config, batches, transformer, text_encoder, tokenizer, vae)


if __name__ == "__main__":
    run_script(main)
