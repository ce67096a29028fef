"""Training of an IP-Adapter for a frozen Sana transformer (arXiv 2308.06721).

The adapter learns to describe an image to the transformer, by the features of an image encoder: each image of the data
is denoised with itself as the image prompt. The transformer may have 4-bit weights.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffusers_sana.models.ip_adapter_sana import SanaIPAdapterModel
from diffusers_sana.models.transformers.attention_sana import SanaImageState
from diffusers_sana.models.transformers.text_sana import ImageStates
from diffusers_sana.pipelines.image_prompts import image_features, load_image_encoder
from diffusers_sana.pipelines.pipeline_sana import SanaPipeline
from diffusers_sana.prompts.encoding import drop_prompts
from diffusers_sana.training.data.batches import Batches, make_loader
from diffusers_sana.training.data.images import Images
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.flow_matching import noisy_batch, timesteps_of, velocity_errors
from diffusers_sana.training.optimizers import optimizer_of
from diffusers_sana.training.recipes.adapter import quantize_base
from diffusers_sana.training.recipes.sana_options import ImagePromptModelOptions, ImagePromptTrainingConfig
from diffusers_sana.training.recipes.text_to_image import (
    NUM_SAMPLES,
    Encoders,
    Prompt,
    SanaInputs,
    bucketed_images,
    doubled,
    first_samples,
    freeze,
    prepare_blocks,
    save_guided_samples,
)
from diffusers_sana.training.recipes.transformer_options import CaptionedDataOptions
from diffusers_sana.training.state_files import copy_with_weights


def train(
    config: ImagePromptTrainingConfig,
    batches: Batches,
    adapter: Any,
    transformer: Any,
    encoders: Encoders | None = None,
    image_encoder: nn.Module | None = None,
    options: tuple[Any, ...] = (),
) -> None:
    """Train `adapter`, saved in `config.output_dir/model`; everything else is frozen.

    Args:
        config: an ImagePromptTrainingConfig.
        batches: see `Batches`. A batch holds images and prompts as in `sana.train`, and of the image prompts
            `image_embeds`, `[B, n, C]` or `[B, n, P, C]`, or `prompt_image`, `[B, 3, H, W]` as the image processor of
            `image_encoder` gives them.
        adapter: a SanaIPAdapterModel of one adapter, at first `SanaIPAdapterModel.from_transformer(transformer, C)`.
        transformer: the SanaTransformer2DModel that it is for, dense or quantized.
        encoders, options: as in `sana.train`.
        image_encoder: for batches of `prompt_image`: see `image_features`.
    """
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    inputs = SanaInputs(config, accelerator.device, encoders)
    freeze(accelerator.device, transformer, image_encoder)
    prepare_blocks(config, transformer)
    adapter.requires_grad_(True)
    optimizer = optimizer_of(config, adapter.train().parameters())
    model, optimizer = accelerator.prepare(adapter, optimizer)
    features = adapter.config["adapters"][0]["features"]

    def image_embeds(batch: dict[str, Any]) -> Tensor:
        """Features of one image prompt per row, or those in the batch."""
        if "image_embeds" in batch:
            return batch["image_embeds"].float()
        if image_encoder is None:
            raise ValueError(
                "`image_encoder` must be given for batches of `prompt_image`, got None. Pass it, or `image_embeds`."
            )
        return image_features(image_encoder, batch["prompt_image"], features)[:, None].float()

    def predict(
        latents: Tensor, sigmas: Tensor, dropped: Tensor, prompt: Prompt, embeds: Tensor, keeps_image: bool = False
    ) -> Tensor:
        """The velocity `[B, C, h, w]`; the adapter's gradients flow through the frozen transformer.

        Rows that are `dropped` have no text, and an image prompt only if `keeps_image`.
        """
        with accelerator.autocast():
            states = model([embeds])
            if not keeps_image:
                states = without_rows(states, dropped)
            text = prompt[0], drop_prompts(prompt[1], dropped)
            context = transformer.encode_text(*text, image_states=states)
            times = timesteps_of(sigmas) * transformer.config.timestep_scale
            return transformer(latents, None, times, text_context=context, return_dict=False)[0].float()

    shown: dict[str, Any] = {}  # what the sample grids show: prompts, images and noise, of the first batch

    def sample(path: Path) -> None:
        if inputs.vae is not None:
            both = partial(predict, prompt=doubled(shown["prompt"]), embeds=torch.cat([shown["embeds"]] * 2))
            save_guided_samples(path, config, accelerator, model, inputs.vae, both, shown["noise"], shown["images"])

    def save(folder: Path) -> None:
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            trained: Any = copy_with_weights(adapter, state)
            trained.save_adapter(folder)

    loop = TrainingLoop(config, accelerator, [model], [optimizer], save=save, sample=sample, options=options)
    for batch in loop.run(batches):
        latents, prompt, embeds = inputs.latents(batch), inputs.prompts(batch), image_embeds(batch)
        if not shown:
            shown = first_samples(config, latents, prompt)
            shown |= {"images": latents[:NUM_SAMPLES], "embeds": embeds[:NUM_SAMPLES]}
        noisy, sigmas, target = noisy_batch(latents, config.flow_shift, config.logit_mean, config.logit_std)
        dropped = torch.rand(len(latents), device=accelerator.device) < config.caption_dropout
        with accelerator.accumulate(model):
            velocity = predict(noisy, sigmas, dropped, prompt, embeds, keeps_image=True)
            loss = velocity_errors(velocity, target, sigmas, config.loss_weighting, config.snr_gamma).mean()
            loop.backward(loss)
            loop.update()
        loop.report(images=len(latents), loss=loss)


def without_rows(states: ImageStates, dropped: Tensor) -> ImageStates:
    """Image prompts without effect in the rows that are `dropped`, `[B]`."""
    kept = ~dropped[:, None, None, None]
    return tuple(tuple(SanaImageState(image.key, image.value * kept) for image in images) for images in states)


class SelfPromptedImages(Dataset):
    """The items of `Images`, each with its image again as `prompt_image` `[3, H, W]`, for the image encoder.

    Args:
        images: the images.
        processor: of the image encoder.
    """

    def __init__(self, images: Images, processor: Any):
        self.images, self.processor, self.sizes_of_items = images, processor, images.sizes_of_items

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.images[index]
        pixels = ((item["pixel_values"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        return item | {"prompt_image": self.processor([Image.fromarray(pixels)], return_tensors="pt").pixel_values[0]}


def run(config: ImagePromptTrainingConfig, data: CaptionedDataOptions, model: ImagePromptModelOptions) -> None:
    """Train for a pipeline on captioned images: what `examples/train_sana_image_prompt.py` does."""
    make_accelerator(config)
    set_seed(config.seed)
    pipeline = SanaPipeline.from_pretrained(model.pretrained)
    options: dict[str, Any] = {"subfolder": model.image_encoder_subfolder} if model.image_encoder_subfolder else {}
    image_encoder, processor = load_image_encoder(model.image_encoder, **options)
    dataset = SelfPromptedImages(bucketed_images(data), processor)
    first = dataset[0]["prompt_image"][None]
    width = image_features(image_encoder, first, model.features).shape[-1]
    set_seed(config.seed)
    adapter = SanaIPAdapterModel.from_transformer(
        pipeline.transformer, width, model.features, model.num_tokens, model.token_dim
    )
    quantize_base(pipeline.transformer, model)
    batches = make_loader(dataset, data.batch_size, config.seed, data.num_workers)
    train(
        config,
        batches,
        adapter,
        pipeline.transformer,
        Encoders.of(pipeline),
        image_encoder,
        options=(data, model),
    )
