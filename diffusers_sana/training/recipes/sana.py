"""Training of a Sana text-to-image transformer by flow matching (arXiv 2410.10629)."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from diffusers_sana.files import read_json
from diffusers_sana.models.transformers.transformer_sana import SanaTransformer2DModel
from diffusers_sana.pipelines.pipeline_sana import SanaPipeline
from diffusers_sana.schedulers.scheduling_flow_dpm_solver import FlowDPMSolverScheduler
from diffusers_sana.training.data.batches import Batches, make_loader
from diffusers_sana.training.data.captions import SampledCaptions
from diffusers_sana.training.growth import grow_transformer
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.flow_matching import ConditionedTransformer, noisy_batch, velocity_errors
from diffusers_sana.training.optimizers import optimizer_of
from diffusers_sana.training.recipes.sana_options import SanaDataOptions, SanaModelOptions, SanaTrainingConfig
from diffusers_sana.training.recipes.sana_video_options import SanaVideoTrainingConfig
from diffusers_sana.training.recipes.text_to_image import (
    NUM_SAMPLES,
    Encoders,
    SanaInputs,
    bucketed_images,
    prepare_blocks,
    sample_noise,
    save_guided_samples,
    save_pipeline,
)
from diffusers_sana.training.state_files import copy_with_weights, sub_state


def train(
    config: SanaTrainingConfig,
    batches: Batches,
    transformer: Any,
    encoders: Encoders | None = None,
    options: tuple[Any, ...] = (),
) -> None:
    """Train `transformer`, and the text encoder with `config.train_text_encoder`; saved in `config.output_dir/model`.

    Args:
        config: a SanaTrainingConfig.
        batches: see `Batches`. A batch holds the images as `pixel_values`
            `[B, 3, H, W]` in [-1, 1] or as scaled `latents` `[B, C, h, w]`; and the prompts as `text`, a list of B
            strings, or as `prompt_embeds` `[B, L, D]` with `prompt_attention_mask` `[B, L]`.
        transformer: a SanaTransformer2DModel.
        encoders: frozen but for a text encoder that trains.
        options: groups of options for data and models, that checkpoints record; see `TrainingLoop`.
    """
    encoders = encoders or Encoders()
    if config.train_text_encoder and encoders.text_encoder is None:
        raise ValueError("`text_encoder` must be given to be trained, got None. Pass it and `tokenizer`.")
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    inputs = SanaInputs(config, accelerator.device, encoders, config.train_text_encoder)
    prepare_blocks(config, transformer)
    model = ConditionedTransformer(transformer, encoders.text_encoder if config.train_text_encoder else None).train()
    optimizer = optimizer_of(config, model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    shown: dict[str, Any] = {}  # what the sample grids show: a batch of prompts, each twice, and the noise

    def sample(path: Path) -> None:
        if encoders.vae is not None:
            prompt = inputs.prompts(shown)  # again, since the text encoder may have trained
            predict = partial(model, prompt=prompt)
            save_guided_samples(path, config, accelerator, model, encoders.vae, predict, shown["noise"])

    def save(folder: Path) -> None:
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            trained = copy_with_weights(transformer, sub_state(state, "transformer."))
            encoder = None
            if config.train_text_encoder:
                encoder = copy_with_weights(encoders.text_encoder, sub_state(state, "text_encoder."))
            scheduler = FlowDPMSolverScheduler(flow_shift=config.flow_shift)
            save_pipeline(folder, SanaPipeline, scheduler, trained, inputs, encoder)

    loop = TrainingLoop(config, accelerator, [model], [optimizer], save=save, sample=sample, options=options)
    for batch in loop.run(batches):
        latents = inputs.latents(batch)
        shown = shown or sample_inputs(config, batch, latents)
        prompt = inputs.prompts(batch)
        noisy, sigmas, target = noisy_batch(latents, config.flow_shift, config.logit_mean, config.logit_std)
        dropped = torch.rand(len(latents), device=accelerator.device) < config.caption_dropout
        with accelerator.accumulate(model):
            velocity = model(noisy, sigmas, prompt, dropped)
            loss = velocity_errors(velocity, target, sigmas, config.loss_weighting, config.snr_gamma).mean()
            loop.backward(loss)
            loop.update()
        loop.report(images=len(latents), loss=loss)


def sample_inputs(
    config: SanaTrainingConfig | SanaVideoTrainingConfig,
    batch: dict[str, Any],
    latents: Tensor,
    samples: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """A batch of prompts for the sample grids, each twice for guidance, and the noise they always start from.

    Args:
        config: has the seed of the noise, and perhaps the prompts.
        batch: whose first prompts are taken otherwise.
        latents: of the batch; the noise has their shape.
        samples: text vectors of all prompts, in the place of both.
    """
    rows: dict[str, Any]
    if samples is None and (config.sample_prompts or config.train_text_encoder or "prompt_embeds" not in batch):
        rows = {"text": list(config.sample_prompts or batch["text"][:NUM_SAMPLES])}
    else:
        names = ("prompt_embeds", "prompt_attention_mask")
        rows = {name: samples[name] if samples else batch[name][:NUM_SAMPLES] for name in names}
    count = len(next(iter(rows.values())))
    twice = {
        name: row * 2 if isinstance(row, list) else torch.cat([row, row]).to(latents.device)
        for name, row in rows.items()
    }
    return twice | {"noise": sample_noise((count, *latents.shape[1:]), config.seed, latents.device)}


def run(config: SanaTrainingConfig, data: SanaDataOptions, model: SanaModelOptions) -> None:
    """Train on captioned images with the parts of a pipeline: what `examples/train_sana.py` does."""
    accelerator = make_accelerator(config)
    set_seed(config.seed)
    pipeline = SanaPipeline.from_pretrained(model.pretrained)
    transformer, encoders = pipeline.transformer, Encoders.of(pipeline)
    if model.transformer_config:
        transformer = SanaTransformer2DModel.from_config(read_json(model.transformer_config))
    if model.num_layers:
        transformer = grow_transformer(transformer, model.num_layers, model.kept_layers, config.seed)
    transformer = with_native_size(transformer, model.sample_size, model.interpolation_scale)
    if not config.train_text_encoder and config.mixed_precision == "bf16":
        pipeline.text_encoder.to(torch.bfloat16)
    images = bucketed_images(data)
    dataset: Any = images
    if data.cache_dir:
        inputs = SanaInputs(config, accelerator.device, encoders, config.train_text_encoder)
        dataset = inputs.cache(images, data.cache_dir, every_caption=True)
    if images.choices is not None:
        sampling = (data.caption_weighting, data.caption_temperature, data.caption_threshold)
        dataset = SampledCaptions(dataset, images.choices, config.seed, *sampling)
    batches = make_loader(dataset, data.batch_size, config.seed, data.num_workers)
    train(config, batches, transformer, encoders, options=(data, model))


def with_native_size(
    transformer: SanaTransformer2DModel, sample_size: int | None = None, interpolation_scale: int | None = None
) -> SanaTransformer2DModel:
    """The same weights, not copied, in a model for another size.

    Nothing but the positional table depends on the size, and that is computed. A model without a table gets one with
    `interpolation_scale`, and must then be trained to use it.

    Args:
        transformer: what was trained at another size.
        sample_size: latent side to be built for, which also is the pipeline's default size; None leaves it.
        interpolation_scale: positions are divided by it. Sana has no table up to 1024 pixels, 1 at 2048, 2 at 4096.
            None leaves it.

    Raises:
        ValueError: a number that is not positive.
    """
    options = {"sample_size": sample_size, "interpolation_scale": interpolation_scale}
    changes = {name: value for name, value in options.items() if value is not None}
    for name, value in changes.items():
        if value <= 0:
            raise ValueError(f"`{name}` must be above 0, got {value}. Leave it out to keep what the model has.")
    if not changes:
        return transformer
    with torch.device("meta"):
        resized = SanaTransformer2DModel.from_config(transformer.config, **changes)
    resized.load_state_dict(transformer.state_dict(), assign=True)
    return resized.train(transformer.training)
