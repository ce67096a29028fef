"""Training of a ControlNet for a frozen Sana transformer (arXiv 2302.05543, 2410.10629)."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import Dataset

from diffusers_sana.models.controlnets.controlnet_sana import SanaControlNetModel, wiring_of
from diffusers_sana.pipelines.pipeline_sana import SanaPipeline
from diffusers_sana.preprocessors import ControlPreprocessor
from diffusers_sana.prompts.encoding import drop_prompts
from diffusers_sana.training.data.batches import Batches, make_loader
from diffusers_sana.training.data.images import Images, load_pixels
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.flow_matching import noisy_batch, timesteps_of, velocity_errors
from diffusers_sana.training.optimizers import optimizer_of
from diffusers_sana.training.recipes.sana_options import (
    ControlNetDataOptions,
    ControlNetModelOptions,
    ControlNetTrainingConfig,
)
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
from diffusers_sana.training.state_files import copy_with_weights


def train(
    config: ControlNetTrainingConfig,
    batches: Batches,
    controlnet: Any,
    transformer: Any,
    encoders: Encoders | None = None,
    options: tuple[Any, ...] = (),
) -> None:
    """Train `controlnet`, saved in `config.output_dir/model`; everything else is frozen.

    Args:
        config: a ControlNetTrainingConfig.
        batches: see `Batches`. A batch holds images and prompts as in `sana.train`, and
            `control_image` `[B, 3, H, W]` in [-1, 1], or its scaled latents as `control_latents` `[B, C, h, w]`.
        controlnet: a SanaControlNetModel, at first `SanaControlNetModel.from_transformer(transformer)`.
        transformer: the SanaTransformer2DModel that it is for.
        encoders, options: as in `sana.train`.
    """
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    inputs = SanaInputs(config, accelerator.device, encoders)
    freeze(accelerator.device, transformer)
    prepare_blocks(config, controlnet, transformer)
    optimizer = optimizer_of(config, controlnet.train().parameters())
    model, optimizer = accelerator.prepare(controlnet, optimizer)

    def predict(latents: Tensor, sigmas: Tensor, dropped: Tensor, prompt: Prompt, control: Tensor) -> Tensor:
        """The velocity `[B, C, h, w]`; the ControlNet's gradients flow through the frozen transformer."""
        text = {"encoder_hidden_states": prompt[0], "encoder_attention_mask": drop_prompts(prompt[1], dropped)}
        timesteps = timesteps_of(sigmas)

        def branch(stream: Tensor) -> tuple[Tensor, ...]:
            scaled = timesteps * controlnet.config.get("timestep_scale", 1.0)
            return model(stream, **text, timestep=scaled, controlnet_cond=control, return_dict=False)[0]

        samples = branch if wiring_of(controlnet) == "nvlabs" else branch(latents)
        times = timesteps * transformer.config.timestep_scale
        with accelerator.autocast():
            options = {"timestep": times, "controlnet_block_samples": samples, "return_dict": False}
            return transformer(latents, **text, **options)[0].float()

    shown: dict[str, Any] = {}  # what the sample grids show: prompts, control latents and noise, of the first batch

    def sample(path: Path) -> None:
        if inputs.vae is not None:
            control = shown["control"]
            both = partial(predict, prompt=doubled(shown["prompt"]), control=control.repeat(2, 1, 1, 1))
            save_guided_samples(path, config, accelerator, model, inputs.vae, both, shown["noise"], above=control)

    def save(folder: Path) -> None:
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            copy_with_weights(controlnet, state).save_pretrained(folder)

    loop = TrainingLoop(config, accelerator, [model], [optimizer], save=save, sample=sample, options=options)
    for batch in loop.run(batches):
        latents = inputs.latents(batch)
        control = inputs.latents(batch, "control_latents", "control_image")
        prompt = inputs.prompts(batch)
        shown = shown or first_samples(config, latents, prompt) | {"control": control[:NUM_SAMPLES]}
        noisy, sigmas, target = noisy_batch(latents, config.flow_shift, config.logit_mean, config.logit_std)
        dropped = torch.rand(len(latents), device=accelerator.device) < config.caption_dropout
        with accelerator.accumulate(model):
            velocity = predict(noisy, sigmas, dropped, prompt, control)
            loss = velocity_errors(velocity, target, sigmas, config.loss_weighting, config.snr_gamma).mean()
            loop.backward(loss)
            loop.update()
        loop.report(images=len(latents), loss=loss)


class ControlledImages(Dataset):
    """The items of `Images`, each with a `control_image` `[3, H, W]` in [-1, 1].

    Args:
        images: the images.
        folder: has a control image of the same name for each, in the same subfolders or in none; "" for what
            `preprocessor` makes of the images.
        preprocessor: one of `PREPROCESSORS`.

    Raises:
        ValueError: a control image is missing, or the package of the preprocessor.
    """

    def __init__(self, images: Images, folder: str = "", preprocessor: str = "sobel"):
        self.images, self.sizes_of_items = images, images.sizes_of_items
        self.preprocess = None if folder else ControlPreprocessor(preprocessor)
        self.paths = [_path_of(Path(folder), Path(name)) for name in images.names] if folder else []
        missing = [path for path in self.paths if not path.is_file()]
        if missing:
            raise ValueError(
                f"`control_data` must have a control image for each of `data`, but lacks {missing[0]} and "
                f"{len(missing) - 1} others."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.images[index]
        if self.preprocess is not None:
            return item | {"control_image": self.preprocess(item["pixel_values"][None])[0]}
        return item | {"control_image": load_pixels(self.paths[index], *self.sizes_of_items[index])}


def _path_of(folder: Path, name: Path) -> Path:
    return folder / name if (folder / name).is_file() else folder / name.name


def run(config: ControlNetTrainingConfig, data: ControlNetDataOptions, model: ControlNetModelOptions) -> None:
    """Train for a pipeline on captioned images: what `examples/train_sana_controlnet.py` does."""
    make_accelerator(config)
    set_seed(config.seed)
    pipeline = SanaPipeline.from_pretrained(model.pretrained)
    controlnet = SanaControlNetModel.from_transformer(pipeline.transformer, model.num_layers, wiring=model.wiring)
    dataset = ControlledImages(bucketed_images(data), data.control_data, data.preprocessor)
    batches = make_loader(dataset, data.batch_size, config.seed, data.num_workers)
    train(config, batches, controlnet, pipeline.transformer, Encoders.of(pipeline), options=(data, model))
