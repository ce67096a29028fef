"""Distil a Sana into a SANA-Sprint, which draws in one to four steps (arXiv 2503.09641).

    python examples/train_sana_sprint.py --data photos --pretrained some/sana-pipeline --cache_dir cache \\
        --output_dir outputs/sprint

The folder holds images and their captions, in any layout that docs/data.md lists; `--data` may also be WebDataset tars
or a dataset of the Hub. The student begins as the
teacher and learns by continuous-time consistency and from a discriminator that looks through the frozen teacher.
Another script calls `train(config, batches, teacher, ...)` with any iterable of batches. Under `output_dir/model` the
result is a SanaSprintPipeline folder, or the transformer alone when the other parts are not given.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import SCMScheduler
from torch import Tensor, nn

from diffusers_sana import SanaPipeline, SanaSprintPipeline
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.prompts.training_prompts import complex_human_instruction, encode_tokens, tokenize_prompts
from diffusers_sana.schedulers import trigflow
from diffusers_sana.training.config import option, parse_config, run_script
from diffusers_sana.training.data.batches import Batches, bucket_sizes, make_loader
from diffusers_sana.training.data.images import load_images
from diffusers_sana.training.data.latent_cache import fill_cache, model_digest, tokenizer_digest
from diffusers_sana.training.data.sources import ImageDataConfig
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.adversarial import (
    DiscriminatorHeads,
    default_blocks,
    discriminator_loss,
    generator_loss,
    teacher_features,
)
from diffusers_sana.training.objectives.flow_matching import ConditionedTransformer
from diffusers_sana.training.objectives.trigflow_distillation import (
    Prompt,
    TrigFlowStudent,
    consistency_tangent,
    directional_derivative,
    guided_prediction,
    weighted_loss,
)
from diffusers_sana.training.optimizers import make_adamw
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.sprint import make_student
from diffusers_sana.training.state_files import copy_with_weights, sub_state


@dataclass(kw_only=True)
class SprintTrainingConfig(ImageDataConfig):
    """Settings of a distillation; the defaults are the paper's where it gives any."""

    output_dir: str = option("outputs/sprint", "folder for checkpoints, samples, log and result", changeable=True)
    pretrained: str = option("", "SanaPipeline folder or repository to distil (command line only)")
    cache_dir: str = option("", "folder to keep latents and text vectors in (command line only)", changeable=True)
    batch_size: int = option(16, "images a batch and process (command line only)")
    num_workers: int = option(4, "processes that load images (command line only)", changeable=True)
    resolution: int = option(1024, "side of the square whose area the buckets have (command line only)")
    max_steps: int = option(20_000, "optimiser steps", changeable=True)
    learning_rate: float | None = option(2e-6, "peak learning rate of the student", changeable=True)
    discriminator_learning_rate: float = option(
        2e-6, "peak learning rate of the discriminator's heads", changeable=True
    )
    betas: tuple[float, float] | None = option((0.9, 0.999), "AdamW betas", changeable=True)
    weight_decay: float | None = option(0.01, "AdamW weight decay of matrices and kernels", changeable=True)
    max_grad_norm: float = option(0.1, "clip the gradient norm; 0 does not clip", changeable=True)
    angle_mean: float = option(0.0, "mean of the log of noise over data at the training angles", changeable=True)
    angle_std: float = option(1.6, "standard deviation of the same", changeable=True)
    sigma_data: float = option(0.5, "TrigFlow's standard deviation of latents, also of the saved scheduler")
    tangent_warmup_steps: int = option(
        4000, "steps until the derivative along the path has its full weight", changeable=True
    )
    tangent_constant: float = option(0.1, "added to the norm that tangents are divided by", changeable=True)
    guidance_scales: tuple[float, ...] = option(
        (4.0, 4.5, 5.0), "guidance scales that the student learns", changeable=True
    )
    adversarial_weight: float = option(
        0.5, "weight of the adversarial loss; 0 leaves the discriminator out", changeable=True
    )
    max_time_share: float = option(
        0.5, "share of images that the discriminator sees drawn from pure noise", changeable=True
    )
    discriminator_mean: float = option(
        -0.6, "as `angle_mean`, of the noise that the discriminator sees through", changeable=True
    )
    discriminator_std: float = option(1.0, "standard deviation of the same", changeable=True)
    discriminator_blocks: tuple[int, ...] = option((), "blocks of the teacher to judge by; default: the paper's")
    misaligned_pairs: bool = option(
        True, "show the discriminator true images with the prompts of others as wrong", changeable=True
    )
    max_sequence_length: int = option(300, "text vectors the transformer sees at most")
    use_instruction: bool = option(True, "put the complex human instruction before prompts, as the pipeline does")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", changeable=True
    )
    sample_guidance: float = option(4.5, "guidance scale of the sample grids", changeable=True)


def train(
    config: SprintTrainingConfig,
    batches: Batches,
    teacher: nn.Module,
    text_encoder: nn.Module | None = None,
    tokenizer: Any = None,
    vae: nn.Module | None = None,
) -> None:
    """Distil `teacher`; the student is saved in `config.output_dir/model`, and everything else stays as it is.

    Args:
        config: the settings.
        batches: as in `train_sana.train`: images as `pixel_values` `[B, 3, H, W]` in [-1, 1], which need `vae`, or as
            scaled `latents` `[B, C, h, w]`; prompts as `text`, which needs `text_encoder` and `tokenizer`, or as
            `prompt_embeds` `[B, L, D]` with `prompt_attention_mask` `[B, L]`.
        teacher: a SanaTransformer2DModel without guidance embedding.
        text_encoder: a Gemma2Model.
        tokenizer: its tokenizer.
        vae: an AutoencoderDC. Sample grids need it.
    """
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    device = accelerator.device
    instruction = complex_human_instruction() if config.use_instruction else ""
    for frozen in (vae, text_encoder, teacher):
        if frozen is not None:
            frozen.to(device).eval().requires_grad_(False)
    guide = ConditionedTransformer(teacher, dense_timesteps=True)
    transformer = make_student(teacher)
    if config.gradient_checkpointing:
        for part in (transformer, teacher):
            part.enable_gradient_checkpointing()
    if config.compile:
        for block in (*transformer.transformer_blocks, *teacher.transformer_blocks):
            block.compile()
    blocks = config.discriminator_blocks or default_blocks(teacher.config.num_layers)
    student = TrigFlowStudent(transformer).train()
    heads = DiscriminatorHeads(teacher.proj_out.in_features, len(blocks)).train()
    student, optimizer, heads, heads_optimizer = accelerator.prepare(
        student,
        make_adamw(student.parameters(), config.learning_rate, config.betas, config.weight_decay),
        heads,
        make_adamw(heads.parameters(), config.discriminator_learning_rate, config.betas, config.weight_decay),
    )
    scales = torch.tensor(config.guidance_scales, device=device)

    def prepare_prompts(batch: dict[str, Any]) -> Prompt:
        """Text vectors `[B, L, D]` and their mask `[B, L]`."""
        if "prompt_embeds" in batch:
            return batch["prompt_embeds"].float(), batch["prompt_attention_mask"]
        if text_encoder is None or tokenizer is None:
            raise ValueError(
                "`text_encoder` and `tokenizer` must be given for batches of `text`, got None. Pass both."
            )
        tokens = tokenize_prompts(tokenizer, batch["text"], config.max_sequence_length, instruction)
        with torch.no_grad():
            embeds, mask = encode_tokens(text_encoder, tokens.to(device))
        return embeds.float(), mask

    def prepare_latents(batch: dict[str, Any]) -> Tensor:
        """Scaled latents, from the batch or from its images."""
        if "latents" in batch:
            return batch["latents"].float()
        if vae is None:
            raise ValueError("`vae` must be given for batches of `pixel_values`, got None. Pass it, or `latents`.")
        return encode_images(vae, batch["pixel_values"])

    def differentiate(noisy: Tensor, angles: Tensor, direction: Tensor, guidance: Tensor, prompt: Prompt) -> Tensor:
        """The tangent `[B, C, h, w]`."""
        plain = accelerator.unwrap_model(student)
        with accelerator.autocast(), kernel_mode("torch"):
            prediction, derivative = directional_derivative(
                lambda x, t: plain(x, t, guidance, prompt)[0], noisy, angles, direction
            )
        warmup = min(1.0, loop.step / config.tangent_warmup_steps) if config.tangent_warmup_steps else 1.0
        settings = (warmup, config.sigma_data, config.tangent_constant)
        return consistency_tangent(noisy, angles, prediction, derivative, direction, *settings)

    def features(latents: Tensor, angles: Tensor, prompt: Prompt) -> list[Tensor]:
        """What the teacher's blocks make of latents under new noise."""
        noisy = trigflow.mix(latents, torch.randn_like(latents), angles)
        with accelerator.autocast():
            return teacher_features(guide, noisy, angles, prompt, blocks)

    def judge(drawn: Tensor, latents: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """The losses of the student and of the discriminator on `drawn` and true latents `[B, C, h, w]`."""
        count = len(latents)
        law = (config.discriminator_mean, config.discriminator_std, config.sigma_data)
        angles = trigflow.sample_angles(count, *law, device)
        fake = features(drawn, angles, prompt)
        # Without its DDP wrapper, which would wait for gradients that are not wanted here.
        frozen = accelerator.unwrap_model(heads).requires_grad_(False)
        fooling = generator_loss(frozen(fake))
        frozen.requires_grad_(True)
        pairs = [prompt, tuple(part.roll(1, 0) for part in prompt)][: 1 + (config.misaligned_pairs and count > 1)]
        shown = tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))
        with torch.no_grad():
            true = features(latents.repeat(len(pairs), 1, 1, 1), angles.repeat(len(pairs)), shown)
        logits = heads([torch.cat([a, b.detach()]) for a, b in zip(true, fake, strict=True)])
        return fooling, discriminator_loss(logits[:count], logits[count:])

    shown: dict[str, Any] = {}  # what the sample grids show: prompts and noise of the first batch

    def sample(path: Path) -> None:
        if vae is None:
            return
        prompt, noise = shown["prompt"], shown["noise"]
        guidance = torch.full([len(noise)], config.sample_guidance, device=device)
        student.eval()
        drawn = [
            trigflow.sample_consistency(
                lambda x, t: student(x, t, guidance, prompt)[0], noise, angles, torch.Generator().manual_seed(0)
            )
            for angles in trigflow.STEP_ANGLES.values()
        ]
        student.train()
        with torch.no_grad():
            images = vae.decode(torch.cat(drawn).to(vae.dtype) / vae.config.scaling_factor).sample
        if accelerator.is_main_process:
            save_image_grid(images, path, columns=len(noise))

    def save(folder: Path) -> None:
        state = accelerator.get_state_dict(student)
        if accelerator.is_main_process:
            trained = copy_with_weights(transformer, sub_state(state, "transformer."))
            save_parts(folder, trained, text_encoder, tokenizer, vae, config)

    modules, optimizers = [student, heads], [optimizer, heads_optimizer]
    loop = TrainingLoop(config, accelerator, modules, optimizers, save=save, sample=sample, averaged=[student])
    for batch in loop.run(batches):
        latents, prompt = prepare_latents(batch), prepare_prompts(batch)
        count = len(latents)
        if not shown:
            noise = torch.randn(latents[:8].shape, generator=torch.Generator().manual_seed(config.seed))
            shown |= {"prompt": tuple(part[:8] for part in prompt), "noise": noise.to(device)}
        angles = trigflow.sample_angles(count, config.angle_mean, config.angle_std, config.sigma_data, device)
        noisy = trigflow.mix(latents, torch.randn_like(latents), angles)
        guidance = scales[torch.randint(len(scales), (count,), device=device)]
        with accelerator.autocast():
            direction = guided_prediction(guide, noisy, angles, guidance, prompt)
        tangent = differentiate(noisy, angles, direction, guidance, prompt)
        both = prompt
        if config.adversarial_weight:  # some of the images once more, from pure noise
            again = (torch.rand(count, device=device) < config.max_time_share).nonzero()[:, 0]
            noisy = torch.cat([noisy, torch.randn_like(latents[again])])
            angles = torch.cat([angles, torch.full([len(again)], trigflow.MAX_ANGLE, device=device)])
            guidance = torch.cat([guidance, guidance[again]])
            both = tuple(torch.cat([part, part[again]]) for part in prompt)
        with accelerator.accumulate(student, heads):
            prediction, log_variance = student(noisy, angles, guidance, both)
            target = prediction[:count].detach() + tangent
            loss = weighted_loss(prediction[:count], target, log_variance[:count])
            terms = {"consistency": loss}
            if config.adversarial_weight:
                drawn = trigflow.clean_latents(noisy, prediction, angles)
                drawn = drawn[:count].index_copy(0, again, drawn[count:])
                terms["generator"], terms["discriminator"] = judge(drawn, latents, prompt)
                loss = loss + config.adversarial_weight * terms["generator"]
                accelerator.backward(terms["discriminator"] * loop.weight)
            accelerator.backward(loss * loop.weight)
            for module, own in ((student, optimizer), (heads, heads_optimizer)):
                if accelerator.sync_gradients and config.max_grad_norm:
                    accelerator.clip_grad_norm_(module.parameters(), config.max_grad_norm)
                own.step()
                own.zero_grad()
        loop.report(images=count, loss=loss, **terms)


@torch.no_grad()
def encode_images(vae: nn.Module, pixel_values: Tensor) -> Tensor:
    """Scaled latents `[B, C, h, w]` of images `[B, 3, H, W]` in [-1, 1]."""
    return vae.encode(pixel_values.to(vae.dtype)).latent.float() * vae.config.scaling_factor


def save_parts(
    folder: Path,
    transformer: nn.Module,
    text_encoder: nn.Module | None,
    tokenizer: Any,
    vae: nn.Module | None,
    config: SprintTrainingConfig,
) -> None:
    """Save a whole pipeline when all parts are there, otherwise the transformer in the folder of a pipeline's name."""
    if text_encoder is None or tokenizer is None or vae is None:
        transformer.save_pretrained(folder / "transformer")
        return
    scheduler = SCMScheduler(sigma_data=config.sigma_data)
    SanaSprintPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """The command line: a captioned image folder, and the pipeline that is to be distilled."""
    config = parse_config(SprintTrainingConfig, argv, description=__doc__)
    if not config.pretrained:
        raise ValueError("`pretrained` must be a SanaPipeline folder or repository, got ''. Pass --pretrained.")
    device = make_accelerator(config).device
    set_seed(config.seed)
    components = SanaPipeline.from_pretrained(config.pretrained).components
    teacher, text_encoder, tokenizer, vae = (
        components[name] for name in ("transformer", "text_encoder", "tokenizer", "vae")
    )
    dataset: Any = load_images(config, bucket_sizes(config.resolution))
    if config.cache_dir:
        vae.to(device)
        text_encoder.to(device)
        instruction = complex_human_instruction() if config.use_instruction else ""

        @torch.no_grad()
        def encode(item: dict[str, Any]) -> dict[str, Tensor]:
            """What the cache keeps of an item."""
            tokens = tokenize_prompts(tokenizer, [item["text"]], config.max_sequence_length, instruction)
            embeds = encode_tokens(text_encoder, tokens.to(device))[0][0]
            return {"latents": encode_images(vae, item["pixel_values"][None].to(device))[0], "prompt_embeds": embeds}

        settings = {
            "vae": model_digest(vae),
            "text_encoder": model_digest(text_encoder),
            "tokenizer": tokenizer_digest(tokenizer),
            "instruction": instruction,
            "max_sequence_length": config.max_sequence_length,
        }
        dataset = fill_cache(dataset, config.cache_dir, encode, settings)
    batches = make_loader(dataset, config.batch_size, config.seed, config.num_workers)
    train(config, batches, teacher, text_encoder, tokenizer, vae)


if __name__ == "__main__":
    run_script(main)
