"""Train a ControlNet for a Sana transformer that stays as it is (arXiv 2302.05543, 2410.10629).

    python examples/train_sana_controlnet.py --data photos --pretrained some/sana-pipeline --output_dir outputs/edges

The folder holds images and their captions, in any layout that docs/data.md lists; `--data` may also be WebDataset tars
or a dataset of the Hub. The ControlNet learns to
follow their edges, or the images of the same names in `--control_data`. Another script calls
`train(config, batches, controlnet, transformer, ...)` with any iterable of batches. The result, under
`output_dir/model`, is what `SanaControlNetModel.from_pretrained` loads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffusers_sana import SanaControlNetModel, SanaPipeline
from diffusers_sana.images import sobel_edges
from diffusers_sana.models.controlnets.controlnet_sana import wiring_of
from diffusers_sana.prompts.training_prompts import (
    complex_human_instruction,
    drop_prompts,
    encode_tokens,
    tokenize_prompts,
)
from diffusers_sana.training.config import option, parse_config, run_script
from diffusers_sana.training.data.batches import Batches, bucket_sizes, make_loader
from diffusers_sana.training.data.images import Images, load_images, load_pixels
from diffusers_sana.training.data.sources import ImageDataConfig
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.flow_matching import (
    interpolate,
    sample_euler,
    sample_sigmas,
    timesteps_of,
    velocity_target,
)
from diffusers_sana.training.optimizers import make_adamw
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.state_files import copy_with_weights


Prompt = tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class ControlNetTrainingConfig(ImageDataConfig):
    """Settings of a ControlNet training."""

    output_dir: str = option(
        "outputs/sana-controlnet", "folder for checkpoints, samples, log and result", changeable=True
    )
    control_data: str = option(
        "",
        "folder with a control image of the same name for each; default: edges (command line only)",
        changeable=True,
    )
    pretrained: str = option("", "SanaPipeline folder or repository that gives the parts (command line only)")
    num_layers: int = option(7, "blocks of the transformer that are copied (command line only)")
    wiring: str = option("diffusers", "`diffusers` or `nvlabs`, see SanaControlNetModel (command line only)")
    batch_size: int = option(16, "images a batch and process (command line only)")
    num_workers: int = option(4, "processes that load images (command line only)", changeable=True)
    resolution: int = option(512, "side of the square whose area the buckets have (command line only)")
    learning_rate: float | None = option(1e-4, "peak learning rate", changeable=True)
    betas: tuple[float, float] | None = option((0.9, 0.999), "AdamW betas", changeable=True)
    weight_decay: float | None = option(0.0, "AdamW weight decay of matrices and kernels", changeable=True)
    warmup_steps: int = option(500, "steps of linear warm-up", changeable=True)
    flow_shift: float = option(3.0, "shift of the noise levels; 6 for 4096 pixels", changeable=True)
    logit_mean: float = option(0.0, "mean of the logit-normal noise levels before the shift", changeable=True)
    logit_std: float = option(
        1.0, "standard deviation of the logit-normal noise levels before the shift", changeable=True
    )
    caption_dropout: float = option(0.1, "share of prompts replaced by the empty one, for guidance", changeable=True)
    max_sequence_length: int = option(300, "text vectors the transformer sees at most")
    use_instruction: bool = option(True, "put the complex human instruction before prompts, as the pipeline does")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", changeable=True
    )
    sample_steps: int = option(20, "Euler steps of the sample grids", changeable=True)
    sample_guidance: float = option(4.5, "guidance scale of the sample grids", changeable=True)


def train(
    config: ControlNetTrainingConfig,
    batches: Batches,
    controlnet: nn.Module,
    transformer: nn.Module,
    text_encoder: nn.Module | None = None,
    tokenizer: Any = None,
    vae: nn.Module | None = None,
) -> None:
    """Train `controlnet`, saved in `config.output_dir/model`; everything else is frozen.

    Args:
        config: the settings.
        batches: iterable of batches, or a function from the number of batches already used to the iterable of those
            that follow, which makes a resumed run exact. A batch holds images and prompts as in
            `train_sana.train`, and `control_image` `[B, 3, H, W]` in [-1, 1], which needs `vae`, or its scaled latents
            as `control_latents` `[B, C, h, w]`.
        controlnet: a SanaControlNetModel, for a beginning `SanaControlNetModel.from_transformer(transformer)`.
        transformer: the SanaTransformer2DModel that it is for.
        text_encoder: a Gemma2Model.
        tokenizer: its tokenizer.
        vae: an AutoencoderDC. Sample grids need it.
    """
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    instruction = complex_human_instruction() if config.use_instruction else ""
    for frozen in (vae, text_encoder, transformer):
        if frozen is not None:
            frozen.to(accelerator.device).eval().requires_grad_(False)
    if config.gradient_checkpointing:
        for part in (controlnet, transformer):
            part.enable_gradient_checkpointing()
    if config.compile:
        for block in (*controlnet.transformer_blocks, *transformer.transformer_blocks):
            block.compile()
    optimizer = make_adamw(controlnet.train().parameters(), config.learning_rate, config.betas, config.weight_decay)
    model, optimizer = accelerator.prepare(controlnet, optimizer)

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
            embeds, mask = encode_tokens(text_encoder, tokens.to(accelerator.device))
        return embeds.float(), mask

    def prepare_latents(batch: dict[str, Any], latents: str, images: str) -> Tensor:
        """Scaled latents, from the batch or from its images."""
        if latents in batch:
            return batch[latents].float()
        if vae is None:
            raise ValueError(f"`vae` must be given for batches of `{images}`, got None. Pass it, or `{latents}`.")
        with torch.no_grad():
            return vae.encode(batch[images].to(vae.dtype)).latent.float() * vae.config.scaling_factor

    def predict(latents: Tensor, sigmas: Tensor, prompt: Prompt, dropped: Tensor, cond: Tensor) -> Tensor:
        """The velocity `[B, C, h, w]`; the ControlNet's gradients flow through the frozen transformer."""
        text = {"encoder_hidden_states": prompt[0], "encoder_attention_mask": drop_prompts(prompt[1], dropped)}
        text["timestep"] = timesteps_of(sigmas) * transformer.config.timestep_scale

        def branch(stream: Tensor) -> tuple[Tensor, ...]:
            return model(stream, **text, controlnet_cond=cond, return_dict=False)[0]

        samples = branch if wiring_of(controlnet) == "nvlabs" else branch(latents)
        with accelerator.autocast():
            return transformer(latents, **text, controlnet_block_samples=samples, return_dict=False)[0].float()

    shown: dict[str, Any] = {}  # what the sample grids show: prompts, control latents and noise, of the first batch

    def sample(path: Path) -> None:
        if vae is None:
            return
        prompt, cond, noise = shown["prompt"], shown["cond"], shown["noise"]
        twice = tuple(torch.cat([part, part]) for part in prompt)
        dropped = torch.arange(2 * len(noise), device=noise.device) >= len(noise)

        def guided(latents: Tensor, sigmas: Tensor) -> Tensor:
            velocity = predict(latents.repeat(2, 1, 1, 1), sigmas.repeat(2), twice, dropped, cond.repeat(2, 1, 1, 1))
            full, empty = velocity.chunk(2)
            return empty + config.sample_guidance * (full - empty)

        model.eval()
        latents = sample_euler(guided, noise, config.sample_steps, config.flow_shift)
        model.train()
        with torch.no_grad():
            images = vae.decode(torch.cat([cond, latents]).to(vae.dtype) / vae.config.scaling_factor).sample
        if accelerator.is_main_process:
            save_image_grid(images, path, columns=len(noise))

    def save(folder: Path) -> None:
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            copy_with_weights(controlnet, state).save_pretrained(folder)

    loop = TrainingLoop(config, accelerator, [model], [optimizer], save=save, sample=sample)
    for batch in loop.run(batches):
        latents = prepare_latents(batch, "latents", "pixel_values")
        cond = prepare_latents(batch, "control_latents", "control_image")
        prompt = prepare_prompts(batch)
        if not shown:
            noise = torch.randn(latents[:8].shape, generator=torch.Generator().manual_seed(config.seed))
            first = tuple(part[:8] for part in prompt)
            shown |= {"prompt": first, "cond": cond[:8], "noise": noise.to(latents.device)}
        noise = torch.randn_like(latents)
        sigmas = sample_sigmas(
            len(latents), config.flow_shift, config.logit_mean, config.logit_std, accelerator.device
        )
        dropped = torch.rand(len(latents), device=accelerator.device) < config.caption_dropout
        with accelerator.accumulate(model):
            velocity = predict(interpolate(latents, noise, sigmas), sigmas, prompt, dropped, cond)
            loss = F.mse_loss(velocity, velocity_target(latents, noise))
            accelerator.backward(loss * loop.weight)
            if accelerator.sync_gradients and config.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        loop.report(images=len(latents), loss=loss)


class ControlledImages(Dataset):
    """The items of `Images`, each with a `control_image` `[3, H, W]` in [-1, 1].

    Args:
        images: the images.
        folder: has a control image of the same name for each, in the same subfolders or in none; "" for their edges.
    """

    def __init__(self, images: Images, folder: str = ""):
        self.images, self.sizes_of_items = images, images.sizes_of_items
        self.paths = [_of_the_same_name(Path(folder), Path(name)) for name in images.names] if folder else None
        missing = [path for path in self.paths or () if not path.is_file()]
        if missing:
            raise ValueError(
                f"`control_data` must have a control image for each of `data`, but lacks {missing[0]} and "
                f"{len(missing) - 1} others."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.images[index]
        if self.paths is None:
            return item | {"control_image": sobel_edges(item["pixel_values"][None])[0]}
        return item | {"control_image": load_pixels(self.paths[index], *self.sizes_of_items[index])}


def _of_the_same_name(folder: Path, name: Path) -> Path:
    return folder / name if (folder / name).is_file() else folder / name.name


def main(argv: list[str] | None = None) -> None:
    """The command line: a captioned image folder, and the pipeline that is to be controlled."""
    config = parse_config(ControlNetTrainingConfig, argv, description=__doc__)
    if not config.pretrained:
        raise ValueError("`pretrained` must be a SanaPipeline folder or repository, got ''. Pass --pretrained.")
    make_accelerator(config)
    set_seed(config.seed)
    parts = SanaPipeline.from_pretrained(config.pretrained).components
    controlnet = SanaControlNetModel.from_transformer(parts["transformer"], config.num_layers, wiring=config.wiring)
    images = load_images(config, bucket_sizes(config.resolution))
    dataset = ControlledImages(images, config.control_data)
    batches = make_loader(dataset, config.batch_size, config.seed, config.num_workers)
    names = ("transformer", "text_encoder", "tokenizer", "vae")
    train(config, batches, controlnet, *(parts[name] for name in names))


if __name__ == "__main__":
    run_script(main)
