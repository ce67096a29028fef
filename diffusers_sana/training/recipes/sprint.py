"""Distillation of a Sana into a SANA-Sprint, which generates in one to four steps (arXiv 2503.09641).

The student begins as the teacher (`make_student`), learns by continuous-time consistency
(`objectives/trigflow_distillation.py`), and from a discriminator that reads the frozen teacher's features
(`objectives/adversarial.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.schedulers.scheduling_scm import SCMScheduler
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from diffusers_sana.models.transformers.sprint_student import make_student
from diffusers_sana.pipelines.pipeline_sana import SanaPipeline
from diffusers_sana.pipelines.pipeline_sana_sprint import SanaSprintPipeline
from diffusers_sana.quantizers.svdquant.api import quantize
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.schedulers import trigflow
from diffusers_sana.training.data.batches import Batches, make_loader
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
    TrigFlowStudent,
    guided_prediction,
    weighted_loss,
)
from diffusers_sana.training.optimizers import make_adamw, optimizer_of
from diffusers_sana.training.recipes.adapter import add_adapter, quantization_of
from diffusers_sana.training.recipes.consistency import guidance_scales, save_consistency_samples, tangent_of
from diffusers_sana.training.recipes.sana_options import SprintDataOptions, SprintTrainingConfig
from diffusers_sana.training.recipes.text_to_image import (
    Encoders,
    Prompt,
    SanaInputs,
    bucketed_images,
    first_samples,
    freeze,
    prepare_blocks,
    save_pipeline,
)
from diffusers_sana.training.recipes.transformer_options import QuantizableOptions
from diffusers_sana.training.state_files import copy_with_weights, sub_state


# Every linear layer and 1x1 convolution but the first, by the ends of their names.
ADAPTED = (
    *("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"),
    *("linear_1", "linear_2", "time_embed.linear", "proj_out"),
)


def train(
    config: SprintTrainingConfig,
    batches: Batches,
    teacher: Any,
    encoders: Encoders | None = None,
    options: tuple[Any, ...] = (),
    quantization: SVDQuantConfig | None = None,
) -> None:
    """Distil `teacher`; the student is saved in `config.output_dir/model`, and everything else stays as it is.

    With `config.lora_rank` the student is a LoRA of `make_student(teacher)`; that and the scheduler are saved, for
    `SanaSprintPipeline.from_teacher`.

    Args:
        config: a SprintTrainingConfig.
        batches: as in `sana.train`.
        teacher: a SanaTransformer2DModel without guidance embedding.
        encoders, options: as in `sana.train`.
        quantization: of the student beside whose weights a LoRA trains; the teacher stays as it is.
    """
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    device = accelerator.device
    inputs = SanaInputs(config, device, encoders)
    freeze(device, teacher)
    guide = ConditionedTransformer(teacher, dense_timesteps=True)
    transformer = make_student(teacher).float()
    if quantization is not None:
        if not config.lora_rank:
            raise ValueError("`lora_rank` must be given for a quantized base, whose weights do not train, got None.")
        quantize(transformer, quantization, progress=False)
    if config.lora_rank:
        add_adapter(transformer, ADAPTED, r=config.lora_rank, lora_alpha=config.lora_rank)
    prepare_blocks(config, transformer, teacher)
    blocks = config.discriminator_blocks or default_blocks(teacher.config.num_layers)
    student = TrigFlowStudent(transformer).train()
    heads = DiscriminatorHeads(teacher.proj_out.in_features, len(blocks)).train()
    student, optimizer, heads, heads_optimizer = accelerator.prepare(
        student,
        optimizer_of(config, [parameter for parameter in student.parameters() if parameter.requires_grad]),
        heads,
        make_adamw(heads.parameters(), config.discriminator_learning_rate, config.betas, config.weight_decay),
    )
    discriminator = Discriminator(config, accelerator, guide, heads, blocks)
    shown: dict[str, Any] = {}  # what the sample grids show: prompts and noise
    chosen = inputs.prompts({"text": list(config.sample_prompts)}) if config.sample_prompts else None

    def sample(path: Path) -> None:
        if inputs.vae is not None:
            save_consistency_samples(path, config, accelerator, student, inputs.vae, **shown)

    def save(folder: Path) -> None:
        state, scheduler = accelerator.get_state_dict(student), SCMScheduler(sigma_data=config.sigma_data)
        if accelerator.is_main_process and config.lora_rank:
            SanaSprintPipeline.save_lora_weights(
                folder,
                transformer_lora_layers=get_peft_model_state_dict(transformer),
                transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
            )
            scheduler.save_pretrained(folder / "scheduler")
        elif accelerator.is_main_process:
            trained = copy_with_weights(transformer, sub_state(state, "transformer."))
            save_pipeline(folder, SanaSprintPipeline, scheduler, trained, inputs)

    modules, optimizers = [student, heads], [optimizer, heads_optimizer]
    loop = TrainingLoop(
        config,
        accelerator,
        modules,
        optimizers,
        save=save,
        sample=sample,
        ema_modules=[student],
        keep_frozen=not config.lora_rank,
        options=options,
    )
    for batch in loop.run(batches):
        latents, prompt = inputs.latents(batch), inputs.prompts(batch)
        count = len(latents)
        shown = shown or first_samples(config, latents, prompt, chosen)
        angles = trigflow.sample_angles(count, config.angle_mean, config.angle_std, config.sigma_data, device)
        noisy = trigflow.mix(latents, torch.randn_like(latents), angles)
        guidance = guidance_scales(config, count, device)
        with accelerator.autocast():
            direction = guided_prediction(guide, noisy, angles, guidance, prompt)
        warmup = min(1.0, loop.step / config.tangent_warmup_steps) if config.tangent_warmup_steps else 1.0
        tangent = tangent_of(config, accelerator, student, noisy, angles, guidance, prompt, direction, warmup)
        prompts = prompt
        if config.adversarial_weight:  # some of the images once more, from pure noise
            again = (torch.rand(count, device=device) < config.max_time_share).nonzero()[:, 0]
            noisy = torch.cat([noisy, torch.randn_like(latents[again])])
            angles = torch.cat([angles, torch.full([len(again)], trigflow.MAX_ANGLE, device=device)])
            guidance = torch.cat([guidance, guidance[again]])
            prompts = tuple(torch.cat([part, part[again]]) for part in prompt)
        with accelerator.accumulate(student, heads):
            prediction, log_variance = student(noisy, angles, guidance, prompts)
            target = prediction[:count].detach() + tangent
            loss = weighted_loss(prediction[:count], target, log_variance[:count])
            terms = {"consistency": loss}
            if config.adversarial_weight:
                generated = trigflow.clean_latents(noisy, prediction, angles)
                generated = generated[:count].index_copy(0, again, generated[count:])
                terms["generator"], terms["discriminator"] = discriminator.losses(generated, latents, prompt)
                loss = loss + config.adversarial_weight * terms["generator"]
                loop.backward(terms["discriminator"])
            loop.backward(loss)
            loop.update()
        loop.report(images=count, loss=loss, **terms)


class Discriminator:
    """Heads on the features that the teacher computes of noisy latents.

    Args:
        config: the settings.
        accelerator: that prepared `heads`.
        guide: the frozen teacher.
        heads: prepared `DiscriminatorHeads`.
        blocks: numbers of the teacher's blocks that the heads read.
    """

    def __init__(
        self,
        config: SprintTrainingConfig,
        accelerator: Accelerator,
        guide: ConditionedTransformer,
        heads: nn.Module,
        blocks: Sequence[int],
    ):
        self.config, self.accelerator, self.guide, self.heads, self.blocks = config, accelerator, guide, heads, blocks

    def losses(self, generated: Tensor, latents: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """The losses of the student and of the heads on generated and true latents `[B, C, h, w]`."""
        config, count = self.config, len(latents)
        angles = trigflow.sample_angles(
            count, config.discriminator_mean, config.discriminator_std, config.sigma_data, latents.device
        )
        fake = self._features(generated, angles, prompt)
        # Without its DDP wrapper, which would wait for gradients that are not wanted here.
        frozen = self.accelerator.unwrap_model(self.heads).requires_grad_(False)
        generator = generator_loss(frozen(fake))
        frozen.requires_grad_(True)
        pairs = [prompt, tuple(part.roll(1, 0) for part in prompt)][: 1 + (config.misaligned_pairs and count > 1)]
        prompts = tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))
        with torch.no_grad():
            true = self._features(latents.repeat(len(pairs), 1, 1, 1), angles.repeat(len(pairs)), prompts)
        logits = self.heads([torch.cat([a, b.detach()]) for a, b in zip(true, fake, strict=True)])
        return generator, discriminator_loss(logits[:count], logits[count:])

    def _features(self, latents: Tensor, angles: Tensor, prompt: Any) -> list[Tensor]:
        """Outputs of the teacher's blocks for latents under new noise."""
        noisy = trigflow.mix(latents, torch.randn_like(latents), angles)
        with self.accelerator.autocast():
            return teacher_features(self.guide, noisy, angles, prompt, self.blocks)


def run(config: SprintTrainingConfig, data: SprintDataOptions, model: QuantizableOptions) -> None:
    """Distil the transformer of a pipeline on captioned images: what `examples/train_sana_sprint.py` does."""
    if model.quantize != "no" and not config.lora_rank:
        raise ValueError(
            f"`lora_rank` must be given with `quantize` {model.quantize!r}, got None. Pass --lora-rank 16."
        )
    device = make_accelerator(config).device
    set_seed(config.seed)
    pipeline = SanaPipeline.from_pretrained(model.pretrained)
    encoders = Encoders.of(pipeline)
    dataset: Any = bucketed_images(data)
    if data.cache_dir:
        dataset = SanaInputs(config, device, encoders).cache(dataset, data.cache_dir)
    batches = make_loader(dataset, data.batch_size, config.seed, data.num_workers)
    train(config, batches, pipeline.transformer, encoders, (data, model), quantization_of(model))
