"""Training of a SANA-Video text-to-video transformer, or of a LoRA for one, by flow matching (arXiv 2509.24695).

A batch holds videos of one number of frames, or images, which are videos of one frame. So a video model continues to
learn from images. With `causal` the frames come in chunks, as LongSANA generates them.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from diffusers_sana.checks import check_frames
from diffusers_sana.loading import checkpoint_path, pipeline_class_name
from diffusers_sana.pipelines.pipeline_sana import SanaPipeline
from diffusers_sana.pipelines.pipeline_sana_video import SanaVideoPipeline
from diffusers_sana.pipelines.pipeline_sana_video_base import VIDEO_INSTRUCTION
from diffusers_sana.pipelines.pipeline_sana_video_long import LongSanaVideoPipeline
from diffusers_sana.pipelines.resolution import VIDEO_ASPECT_RATIO_BINS
from diffusers_sana.pipelines.video_decoding import compression, decode_videos, encode_videos
from diffusers_sana.prompts.tokenization import join_instruction
from diffusers_sana.schedulers.scheduling_flow_dpm_solver import FlowDPMSolverScheduler
from diffusers_sana.training.data.batches import Batches, bucket_sizes, make_loader
from diffusers_sana.training.data.images import Images
from diffusers_sana.training.data.sources import FolderSource, find_source
from diffusers_sana.training.data.videos import SUFFIXES, Videos
from diffusers_sana.training.growth import video_transformer
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.block_causal import BlockCausalTransformer
from diffusers_sana.training.objectives.flow_matching import (
    ConditionedTransformer,
    noisy_batch,
    sample_guided,
    velocity_errors,
)
from diffusers_sana.training.optimizers import optimizer_of
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.adapter import add_adapter_of, quantize_base, save_adapter
from diffusers_sana.training.recipes.sana import sample_inputs
from diffusers_sana.training.recipes.sana_video_options import (
    SanaVideoDataOptions,
    SanaVideoModelOptions,
    SanaVideoTrainingConfig,
)
from diffusers_sana.training.recipes.text_to_image import Encoders, SanaInputs, prepare_blocks, save_pipeline
from diffusers_sana.training.state_files import copy_with_weights, sub_state


SHOWN_FRAMES = 8  # of a video in the sample grids
INFERENCE_SHIFT = 8.0  # of the scheduler that is saved where none is given


class SanaVideoInputs(SanaInputs):
    """`SanaInputs` of videos: latents `[B, C, T, h, w]` of `pixel_values` `[B, 3, F, H, W]`.

    The instruction is that of the pipeline: LongSANA has the one of images.
    """

    def __init__(self, config: SanaVideoTrainingConfig, device: torch.device, encoders: Encoders | None = None):
        super().__init__(config, device, encoders, config.train_text_encoder)
        if config.use_instruction and not config.causal:
            self.instruction = join_instruction(VIDEO_INSTRUCTION)

    @torch.no_grad()
    def latents(self, batch: dict[str, Any], latents: str = "latents", images: str = "pixel_values") -> Tensor:
        """As in `SanaInputs`, without the gradients of the autoencoder."""
        if latents not in batch and self.vae is not None:
            return encode_videos(self.vae, batch[images])
        return super().latents(batch, latents, images)


def train(
    config: SanaVideoTrainingConfig,
    batches: Batches,
    transformer: Any,
    encoders: Encoders | None = None,
    samples: dict[str, Tensor] | None = None,
    scheduler: Any = None,
    options: tuple[Any, ...] = (),
) -> None:
    """Train `transformer`, or with `config.lora` an adapter for it; saved in `config.output_dir/model`.

    Args:
        config: a SanaVideoTrainingConfig.
        batches: see `Batches`. A batch holds the videos as `pixel_values` `[B, 3, F, H, W]` in [-1, 1] or as `latents`
            `[B, C, T, h, w]` as the transformer has them; and the prompts as `text`, a list of B strings, or as
            `prompt_embeds` `[B, L, D]` with `prompt_attention_mask` `[B, L]`.
        transformer: a SanaVideoTransformer3DModel, for a LoRA also a quantized one.
        encoders: frozen but for a text encoder that trains. The autoencoder may be any that SanaVideoPipeline takes.
        samples: `prompt_embeds` and `prompt_attention_mask` of the sample grids, where no text encoder is given;
            default: those of the first batch.
        scheduler: of the pipeline that is saved.
        options: groups of options for data and models, that checkpoints record; see `TrainingLoop`.
    """
    encoders = encoders or Encoders()
    if config.train_text_encoder and encoders.text_encoder is None:
        raise ValueError("`text_encoder` must be given to be trained, got None. Pass it and `tokenizer`.")
    accelerator = make_accelerator(config)
    set_seed(config.seed)
    if config.lora:
        add_adapter_of(config, transformer)
    set_seed(config.seed, device_specific=True)
    inputs = SanaVideoInputs(config, accelerator.device, encoders)
    prepare_blocks(config, transformer)
    text_encoder = encoders.text_encoder if config.train_text_encoder else None
    model: nn.Module
    if config.causal:
        model = BlockCausalTransformer(transformer, config.chunk_frames, text_encoder=text_encoder)
    else:
        model = ConditionedTransformer(transformer, text_encoder)
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = optimizer_of(config, trained)
    model, optimizer = accelerator.prepare(model, optimizer)
    shown: dict[str, Any] = {}  # what the sample grids show: a batch of prompts, each twice, and the noise

    def sample(path: Path) -> None:
        if encoders.vae is not None:
            save_video_samples(path, config, accelerator, model, encoders.vae, inputs.prompts(shown), shown["noise"])

    def save(folder: Path) -> None:
        if config.lora:
            if accelerator.is_main_process:
                save_adapter(folder, transformer)
            return
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            whole = copy_with_weights(transformer, sub_state(state, "transformer."))
            encoder = None
            if config.train_text_encoder:
                encoder = copy_with_weights(encoders.text_encoder, sub_state(state, "text_encoder."))
            solver = scheduler or FlowDPMSolverScheduler(flow_shift=INFERENCE_SHIFT)
            pipeline_class = LongSanaVideoPipeline if config.causal else SanaVideoPipeline
            save_pipeline(folder, pipeline_class, solver, whole, inputs, encoder)

    loop = TrainingLoop(
        config,
        accelerator,
        [model],
        [optimizer],
        save=save,
        sample=sample,
        keep_frozen=not config.lora,
        options=options,
    )
    for batch in loop.run(batches):
        latents = inputs.latents(batch)
        if not shown or shown["noise"].shape[2] < latents.shape[2]:  # the first batch may be of images
            shown = sample_inputs(config, batch, latents, samples)
        prompt = inputs.prompts(batch)
        noisy, sigmas, target = noisy_batch(latents, config.flow_shift, config.logit_mean, config.logit_std)
        dropped = torch.rand(len(latents), device=accelerator.device) < config.caption_dropout
        past = {"clean": latents} if config.causal else {}
        with accelerator.accumulate(model):
            velocity = model(noisy, sigmas, prompt, dropped, **past)
            loss = velocity_errors(velocity, target, sigmas, config.loss_weighting, config.snr_gamma).mean()
            loop.backward(loss)
            loop.update()
        loop.report(images=len(latents), loss=loss)


@torch.no_grad()
def save_video_samples(
    path: Path,
    config: SanaVideoTrainingConfig,
    accelerator: Accelerator,
    model: nn.Module,
    vae: Any,
    prompt: Any,
    noise: Tensor,
) -> None:
    """Sample videos with guidance and write some of their frames as one image, a row for each video.

    Args:
        path: of the image.
        config: the settings.
        accelerator: that prepared `model`.
        model: what trains; sampled from in evaluation mode.
        vae: decodes.
        prompt: each prompt twice.
        noise: `[N, C, T, h, w]`.
    """
    model.eval()
    settings = config.sample_guidance, config.sample_steps, config.flow_shift
    if config.causal:
        with accelerator.autocast():  # not only in `forward`: the state of a chunk is that of the transformer itself
            latents = accelerator.unwrap_model(model).sample(prompt, noise, *settings)
    else:
        latents = sample_guided(partial(model, prompt=prompt), noise, *settings)
    model.train()
    videos = decode_videos(vae, latents, compression(vae)[1])  # [N, 3, F, H, W]
    chosen = torch.linspace(0, videos.shape[2] - 1, min(SHOWN_FRAMES, videos.shape[2])).round().long()
    if accelerator.is_main_process:
        save_image_grid(videos[:, :, chosen].transpose(1, 2).flatten(0, 1), path, columns=len(chosen))


def run(config: SanaVideoTrainingConfig, data: SanaVideoDataOptions, model: SanaVideoModelOptions) -> None:
    """Train on a folder of videos for a pipeline: what `examples/train_sana_video.py` does."""
    train(config, *prepare(config, data, model), options=(data, model))


def prepare(
    config: SanaVideoTrainingConfig, data: SanaVideoDataOptions, model: SanaVideoModelOptions
) -> tuple[Batches, Any, Encoders, dict[str, Tensor] | None, Any]:
    """Cached batches, transformer, encoders, prompts of the sample grids and scheduler, as `train` takes them.

    The text encoder is used here only beside a LoRA, and freed afterwards.
    """
    if model.quantize != "no" and not config.lora:
        raise ValueError(f"`quantize` must be 'no' without `lora`, got {model.quantize!r}: a LoRA trains beside it.")
    device = make_accelerator(config).device
    set_seed(config.seed)
    pipe = load_video_pipeline(config, model.pretrained)
    videos = find_videos(pipe, data)
    encoders = Encoders.of(pipe)
    inputs = SanaVideoInputs(config, device, encoders)
    dataset = inputs.cache(videos, data.cache_dir or str(Path(config.output_dir) / "cache"))
    samples = None
    if config.lora:
        samples = inputs.encode_samples(config.sample_prompts)
        encoders = Encoders(vae=pipe.vae)
        quantize_base(pipe.transformer, model)
    batches = make_loader(dataset, data.batch_size, config.seed, data.num_workers)
    return batches, pipe.transformer, encoders, samples, pipe.scheduler


def load_video_pipeline(config: SanaVideoTrainingConfig, pretrained: str) -> Any:
    """The SanaVideoPipeline of a folder or repository; one of a SanaPipeline begins with its weights.

    The transformer is in fp32, unless it stays as it is beside a LoRA; a text encoder that does not train has the
    precision of the training.
    """
    low = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    dtypes = {
        "default": torch.float32,
        "transformer": low if config.lora else torch.float32,
        "text_encoder": torch.float32 if config.train_text_encoder else low,
    }
    place = checkpoint_path(pretrained)
    if pipeline_class_name(place) == "SanaPipeline":
        pipe = SanaPipeline.from_pretrained(place, dtype=dtypes)
        transformer = video_transformer(pipe.transformer)
        shifted = FlowDPMSolverScheduler(flow_shift=INFERENCE_SHIFT)
        kept = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae")}  # no image prompts
        return SanaVideoPipeline(**kept, transformer=transformer, scheduler=shifted)
    return (LongSanaVideoPipeline if config.causal else SanaVideoPipeline).from_pretrained(place, dtype=dtypes)


def find_videos(pipe: Any, data: SanaVideoDataOptions) -> Videos:
    """The clips and images that the options name, at the sizes of a pipeline.

    Raises:
        ValueError: the autoencoder or the transformer cannot have so many frames.
    """
    per_latent, cell = compression(pipe.vae)
    patch = pipe.transformer.config.patch_size
    most = pipe.transformer.config.rope_max_seq_len * patch[0]
    for frames in data.frames:
        check_frames(frames, per_latent, patch[0], most, "`rope_max_seq_len` of the transformer")
    cell *= max(patch[1:])
    sample_size = pipe.transformer.config.sample_size
    table = VIDEO_ASPECT_RATIO_BINS.get(sample_size)
    if data.resolution is None and table is not None:
        sizes = [(int(height), int(width)) for height, width in table.values()]
    else:
        sizes = bucket_sizes(data.resolution or sample_size * cell, cell)
    source = FolderSource(
        data.data, data.data_split, data.caption_column, allow_outside=data.allow_outside, suffixes=SUFFIXES
    )
    images = Images(find_source(replace(data, data=data.image_data)), sizes) if data.image_data else None
    return Videos(source, sizes, data.frames, data.fps, data.clips, images)
