"""What the recipes for Sana models share: latents and prompts of batches, a cache of both, sample grids, saving.

Legend: B batch, C latent channels, h/w latent height and width, L text vectors, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_sana.prompts.encoding import (
    PromptTokens,
    complex_human_instruction,
    encode_tokens,
    tokenize_prompts,
)
from diffusers_sana.training.config import TrainingConfig
from diffusers_sana.training.data.batches import bucket_sizes, collate
from diffusers_sana.training.data.captions import embeds_name
from diffusers_sana.training.data.images import Images
from diffusers_sana.training.data.latent_cache import CachedItems, fill_cache, model_digest, tokenizer_digest
from diffusers_sana.training.data.sources import Captions, find_source
from diffusers_sana.training.data.videos import Videos
from diffusers_sana.training.objectives.flow_matching import sample_guided
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.transformer_options import (
    CaptionedDataOptions,
    FlowTrainingConfig,
    PromptTrainingConfig,
    TransformerTrainingConfig,
)


Prompt = tuple[Tensor, Tensor]  # vectors `[B, L, D]` and mask `[B, L]`
NUM_SAMPLES = 8  # images of a sample grid


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What encodes the images and prompts of batches; what the batches do not need may be None.

    Attributes:
        vae: an AutoencoderDC, for batches of images; sample grids need it too.
        text_encoder, tokenizer: a Gemma2Model and its tokenizer, for batches of text.
    """

    vae: Any = None
    text_encoder: Any = None
    tokenizer: Any = None

    @classmethod
    def of(cls, pipeline: Any) -> Self:
        """Those of a pipeline of Sana."""
        return cls(vae=pipeline.vae, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer)


class SanaInputs:
    """Turns batches into what a Sana transformer trains on: scaled latents and the text vectors of prompts.

    The given models are frozen and moved to `device`.

    Args:
        config: says how prompts are read.
        device: where the models run.
        encoders: the models; None where batches hold latents and text vectors.
        train_text_encoder: leave the text encoder as it is, and return tokens for it in the place of vectors.
    """

    def __init__(
        self,
        config: PromptTrainingConfig,
        device: torch.device,
        encoders: Encoders | None = None,
        train_text_encoder: bool = False,
    ):
        encoders = encoders or Encoders()
        self.vae, self.text_encoder, self.tokenizer = encoders.vae, encoders.text_encoder, encoders.tokenizer
        self.device, self.train_text_encoder = device, train_text_encoder
        self.max_sequence_length = config.max_sequence_length
        self.instruction = complex_human_instruction() if config.use_instruction else ""
        freeze(device, self.vae, None if train_text_encoder else self.text_encoder)

    def latents(self, batch: dict[str, Any], latents: str = "latents", images: str = "pixel_values") -> Tensor:
        """Scaled latents `[B, C, h, w]`: `batch[latents]`, or those of `batch[images]`.

        Raises:
            ValueError: there are images, and no autoencoder.
        """
        if latents in batch:
            return batch[latents].float()
        if self.vae is None:
            raise ValueError(f"`vae` must be given for batches of `{images}`, got None. Pass it, or `{latents}`.")
        return encode_images(self.vae, batch[images])

    def prompts(self, batch: dict[str, Any]) -> Any:
        """The `Prompt` in `batch`, or that of its `text`; `PromptTokens` for a text encoder that trains.

        Raises:
            ValueError: there is text, and no text encoder or tokenizer.
        """
        if "prompt_embeds" in batch and not self.train_text_encoder:
            return batch["prompt_embeds"].float(), batch["prompt_attention_mask"]
        tokens = self._tokens(batch["text"])
        if self.train_text_encoder:
            return tokens
        embeds, mask = self._encode(tokens)
        return embeds.float(), mask

    def encode_prompt(self, prompt: str) -> Tensor:
        """Text vectors `[L, D]`."""
        return self._encode(self._tokens([prompt]))[0][0]

    def encode_samples(self, prompts: Sequence[str]) -> dict[str, Tensor] | None:
        """`prompt_embeds` and `prompt_attention_mask` of the prompts of sample grids, on the CPU; None without any."""
        rows = [{"prompt_embeds": self.encode_prompt(prompt).cpu()} for prompt in prompts]
        return collate(rows) if rows else None

    def cache(self, images: Images | Videos, folder: str, every_caption: bool = False) -> CachedItems:
        """The images, or videos, as cached latents and, unless the text encoder trains, text vectors.

        Args:
            images: what to encode.
            folder: of the cache; see `fill_cache`.
            every_caption: keep the vectors of all captions in `captions.jsonl`, and not only of the best.
        """

        def encode(item: dict[str, Any]) -> dict[str, Tensor]:
            tensors = {"latents": self.latents({"pixel_values": item["pixel_values"][None].to(self.device)})[0]}
            if self.train_text_encoder:
                return tensors
            if not every_caption or "texts" not in item:
                return tensors | {"prompt_embeds": self.encode_prompt(item["text"])}
            vectors = {embeds_name(at): self.encode_prompt(text) for at, text in enumerate(item["texts"])}
            return tensors | vectors

        settings = {
            "vae": model_digest(self.vae),
            "text_encoder": None if self.train_text_encoder else model_digest(self.text_encoder),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "instruction": self.instruction,
            "max_sequence_length": self.max_sequence_length,
        }
        return fill_cache(images, folder, encode, settings)

    def _tokens(self, texts: list[str]) -> PromptTokens:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "`text_encoder` and `tokenizer` must be given for batches of `text`, got None. Pass both."
            )
        tokens = tokenize_prompts(self.tokenizer, texts, self.max_sequence_length, self.instruction)
        return tokens.to(self.device)

    @torch.no_grad()
    def _encode(self, tokens: PromptTokens) -> Prompt:
        return encode_tokens(cast(Any, self.text_encoder), tokens)


def bucketed_images(data: CaptionedDataOptions, captions: Captions = "expected") -> Images:
    """The images of `data`, in the buckets of its resolutions; see `find_source` for errors."""
    sizes = [bucket_sizes(side, shapes=data.buckets) for side in (data.resolution, *data.more_resolutions)]
    return Images(find_source(data, captions), *sizes)


def freeze(device: torch.device, *models: nn.Module | None) -> None:
    """Move models to `device`, in evaluation mode and without gradients; None is passed over."""
    for model in models:
        if model is not None:
            model.to(device).eval().requires_grad_(False)


def prepare_blocks(config: TransformerTrainingConfig, *transformers: Any) -> None:
    """Set up gradient checkpointing and compilation of transformers as the config says."""
    for transformer in transformers:
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if config.compile:
            for block in transformer.transformer_blocks:
                block.compile()


@torch.no_grad()
def encode_images(vae: Any, pixel_values: Tensor) -> Tensor:
    """Scaled latents `[B, C, h, w]` of images `[B, 3, H, W]` in [-1, 1]; the mode of an AutoencoderKL's."""
    encoded = vae.encode(pixel_values.to(vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    return latents.float() * vae.config.scaling_factor


def doubled(prompt: Prompt) -> Prompt:
    """The prompts and, for guidance, the same again."""
    embeds, mask = prompt
    return torch.cat([embeds, embeds]), torch.cat([mask, mask])


def first_samples(
    config: TrainingConfig, latents: Tensor, prompt: Prompt, chosen: Prompt | None = None
) -> dict[str, Any]:
    """What the sample grids of a run show: `prompt`, and `noise` that all of them begin with.

    Args:
        config: has the seed of the noise.
        latents: of the first batch, `[B, C, h, w]`.
        prompt: of the first batch; the first ones of it are shown.
        chosen: shown instead.
    """
    shown = tuple(part.to(latents.device) for part in chosen or (part[:NUM_SAMPLES] for part in prompt))
    return {"prompt": shown, "noise": sample_noise((len(shown[0]), *latents.shape[1:]), config.seed, latents.device)}


def sample_noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """The noise that every sample grid of a run starts from."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def save_guided_samples(
    path: Path,
    config: FlowTrainingConfig,
    accelerator: Accelerator,
    model: nn.Module,
    vae: Any,
    predict: Callable[..., Tensor],
    noise: Tensor,
    above: Tensor | None = None,
) -> None:
    """Sample latents by flow matching with guidance, as the config says, and write them as a grid of images.

    Args:
        path: of the image.
        config: the settings.
        accelerator: that prepared `model`.
        model: what trains; sampled from in evaluation mode.
        vae: decodes.
        predict, noise: as in `sample_guided`.
        above: latents `[N, C, h, w]` of a first row of images.
    """
    model.eval()
    latents = sample_guided(predict, noise, config.sample_guidance, config.sample_steps, config.flow_shift)
    model.train()
    if above is None:
        save_samples(path, vae, latents, accelerator)
    else:
        save_samples(path, vae, torch.cat([above, latents]), accelerator, columns=len(noise))


@torch.no_grad()
def save_samples(path: Path, vae: Any, latents: Tensor, accelerator: Accelerator, columns: int = NUM_SAMPLES) -> None:
    """Decode scaled latents `[N, C, h, w]` in every process; the main one writes them as a grid."""
    images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    if accelerator.is_main_process:
        save_image_grid(images, path, columns=columns)


def save_pipeline(
    folder: Path, pipeline_class: Any, scheduler: Any, transformer: Any, inputs: SanaInputs, text_encoder: Any = None
) -> None:
    """Save a whole pipeline when all parts are there, else what was trained, in folders of a pipeline's names.

    Args:
        folder: where to.
        pipeline_class: SanaPipeline or SanaSprintPipeline.
        scheduler: of the pipeline.
        transformer: the trained one.
        inputs: has the other parts.
        text_encoder: the trained one; None: that of `inputs`, which did not train.
    """
    vae, tokenizer = inputs.vae, inputs.tokenizer
    encoder = inputs.text_encoder if text_encoder is None else text_encoder
    if encoder is not None and tokenizer is not None and vae is not None:
        pipeline_class(tokenizer, encoder, vae, transformer, scheduler).save_pretrained(folder)
        return
    transformer.save_pretrained(folder / "transformer")
    if text_encoder is not None:
        text_encoder.save_pretrained(folder / "text_encoder")
