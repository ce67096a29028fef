"""Post-training of Sana on pairs of images, of which people or a judge prefer one: a LoRA by Diffusion-DPO.

Pairs come from a file; or the pipeline generates images of prompts, and a judge chooses the best and the worst.

Legend: B pairs, C latent channels, h/w latent height and width, L text vectors, D text width.
"""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffusers_sana.evaluation.images import generate_missing
from diffusers_sana.evaluation.judges import judged
from diffusers_sana.evaluation.measure import score_images
from diffusers_sana.files import atomic_write, model_identity
from diffusers_sana.training.data.batches import Batches, make_loader
from diffusers_sana.training.data.captions import Caption
from diffusers_sana.training.data.images import Images
from diffusers_sana.training.data.metadata import inside, read_rows
from diffusers_sana.training.data.sources import file_stamp
from diffusers_sana.training.loop import make_accelerator
from diffusers_sana.training.objectives.dpo import preference_losses
from diffusers_sana.training.objectives.flow_matching import (
    interpolate,
    sample_sigmas,
    velocity_errors,
    velocity_target,
)
from diffusers_sana.training.recipes.adapter import (
    check_flow_matching,
    check_flow_shift,
    fit_adapter,
    load_base,
    quantize_base,
)
from diffusers_sana.training.recipes.nft import read_prompts, reward_of, without_adapter
from diffusers_sana.training.recipes.post_training_options import DpoDataOptions, DpoModelOptions, DpoTrainingConfig
from diffusers_sana.training.recipes.text_to_image import Encoders, Prompt, SanaInputs, doubled


logger = logging.getLogger(__name__)

PAIRS_FILE = "pairs.jsonl"
FIELDS = ("prompt", "preferred", "rejected")


def train(
    config: DpoTrainingConfig,
    batches: Batches,
    transformer: Any,
    vae: nn.Module | None = None,
    samples: dict[str, Tensor] | None = None,
    options: tuple[Any, ...] = (),
) -> None:
    """Train an adapter for `transformer`, which keeps its own weights; saved in `config.output_dir/model`.

    Args:
        config: a DpoTrainingConfig.
        batches: see `Batches`. A batch holds scaled `latents` of the preferred images and `rejected_latents`, each
            `[B, C, h, w]`, `prompt_embeds` `[B, L, D]` and `prompt_attention_mask` `[B, L]`.
        transformer: a SanaTransformer2DModel, dense or quantized, without adapters. Afterwards it has the trained one.
        vae, samples, options: as in `lora.train`.

    Raises:
        ValueError: the transformer is one of SANA-Sprint, or `flow_shift` is not given.
    """
    check_flow_matching(transformer)
    check_flow_shift(config)
    fit_adapter(config, batches, transformer, partial(preference_terms, config, transformer), vae, samples, options)


def preference_terms(
    config: DpoTrainingConfig,
    transformer: Any,
    accelerator: Accelerator,
    model: nn.Module,
    latents: Tensor,
    prompt: Prompt,
    batch: dict[str, Any],
) -> dict[str, Tensor]:
    """The mean `loss`; `accuracy`, the share of pairs whose preferred image the model prefers; and `margin`."""
    shift = cast(float, config.flow_shift)
    sigmas = sample_sigmas(len(latents), shift, config.logit_mean, config.logit_std, latents.device)
    noise = torch.randn_like(latents).repeat(2, 1, 1, 1)
    both, levels, prompts = torch.cat([latents, batch["rejected_latents"].float()]), sigmas.repeat(2), doubled(prompt)
    noisy, target = interpolate(both, noise, levels), velocity_target(both, noise)
    model.eval()
    with torch.no_grad(), without_adapter(transformer):
        base = model(noisy, levels, prompts)
    model.train()
    velocity = model(noisy, levels, prompts)
    weighting = config.loss_weighting, config.snr_gamma
    errors, base_errors = (velocity_errors(each, target, levels, *weighting) for each in (velocity, base))
    losses, margins = preference_losses(errors, base_errors, config.dpo_beta)
    loss = losses.mean() + config.sft_weight * errors[: len(latents)].mean()
    return {"loss": loss, "accuracy": (margins.detach() > 0).float().mean(), "margin": margins.detach().mean()}


def run(config: DpoTrainingConfig, data: DpoDataOptions, model: DpoModelOptions) -> None:
    """Train on pairs for a pipeline: what `examples/train_sana_dpo.py` does."""
    device = make_accelerator(config).device
    set_seed(config.seed)
    pipe = load_base(config, model.pretrained, device)
    check_flow_matching(pipe.transformer)
    path = Path(data.pairs)
    if not data.pairs:
        folder = Path(config.output_dir) / "pairs"
        path = folder / PAIRS_FILE
        with PartialState().main_process_first():
            if PartialState().is_local_main_process:
                rank_images(pipe, config, data, model, folder)
    inputs = SanaInputs(config, device, Encoders.of(pipe))
    images = Images(PairSource(path), [(data.resolution, data.resolution)])
    items = inputs.cache(images, data.cache_dir or str(Path(config.output_dir) / "cache"))
    quantize_base(pipe.transformer, model)
    batches = make_loader(Pairs(items, images.names), data.batch_size, config.seed, data.num_workers)
    train(config, batches, pipe.transformer, pipe.vae, options=(data, model))


class PairSource:
    """The images of a file of pairs as an `ImageSource`: of pair i the preferred one is 2 i, the rejected one 2 i + 1.

    Args:
        path: a JSON Lines file; each line has the `FIELDS`: a prompt, and two paths relative to the file's folder.

    Raises:
        ValueError: there is no pair, or a line is not a pair; the message names the line.
    """

    choices: list[list[Caption]] | None = None

    def __init__(self, path: Path):
        self.names: list[str] = []
        self.captions: list[str] = []
        self.paths: list[Path] = []
        for where, row in read_rows(path):
            if wrong := [name for name in FIELDS if not isinstance(row.get(name), str) or not row[name]]:
                raise ValueError(f"{where}: `{wrong[0]}` must be a text, got {row.get(wrong[0])!r} of {sorted(row)}.")
            for name in FIELDS[1:]:
                file = inside(path.parent / row[name], path.parent, where)
                if not file.is_file():
                    raise ValueError(f"{where}: there is no file {str(file)!r}. Paths are relative to the file's.")
                self.names.append(row[name])
                self.captions.append(row["prompt"])
                self.paths.append(file)
        if not self.paths:
            raise ValueError(f"`pairs` must be a file of at least one pair, but {str(path)!r} has none.")

    def open(self, index: int) -> Path:
        """The path of an image."""
        return self.paths[index]

    def stamp(self, index: int) -> str:
        """Size and time of change of an image's file."""
        return file_stamp(self.paths[index])


class Pairs(Dataset):
    """Pairs of items of a `PairSource`, as `train` takes them.

    Args:
        items: cached; those of a pair follow each other.
        names: of the images.
    """

    def __init__(self, items: Any, names: list[str]):
        self.items, self.sizes_of_items, self.names = items, items.sizes_of_items[::2], names

    def __len__(self) -> int:
        return len(self.sizes_of_items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[2 * index] | {"rejected_latents": self.items[2 * index + 1]["latents"]}


def rank_images(
    pipe: Any, config: DpoTrainingConfig, data: DpoDataOptions, model: DpoModelOptions, folder: Path
) -> None:
    """Generate `data.group_size` images of each prompt, and write the best and the worst into `folder/pairs.jsonl`.

    Prompts whose images are all judged alike are left out. If it was stopped, it continues where it stopped.

    Raises:
        ValueError: `folder` has images of other settings, or all images are judged alike.
    """
    prompts, checks = read_prompts(Path(data.prompts))
    pipe.set_progress_bar_config(disable=True)
    count = data.group_size
    options = {"num_inference_steps": data.rollout_steps, "guidance_scale": data.rollout_guidance}
    size = {"height": data.resolution, "width": data.resolution}

    def generate(texts: list[str], seeds: list[int]) -> Any:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        return pipe(texts, generator=generators, **options, **size).images

    every = [prompt for prompt in prompts for _ in range(count)]
    seeds = [config.seed + index for index in range(len(every))]
    settings = {
        "model": model.pretrained,
        "model_files": model_identity(model.pretrained),
        "dtype": config.mixed_precision,
        "reward": [*model.reward, *model.reward_weights],
        "options": options | size,
    }
    paths = generate_missing(generate, every, seeds, folder / "images", settings, data.rollout_batch_size)
    if (folder / PAIRS_FILE).exists():
        return
    reward = reward_of(model, checks, pipe.device)
    scores = torch.tensor(score_images(paths, every, partial(judged, reward))).view(-1, count)
    rows = best_and_worst(prompts, scores, [path.relative_to(folder).as_posix() for path in paths])
    if not rows:
        raise ValueError("`reward` must tell images apart, but all of each prompt are judged alike. Use another.")
    if len(rows) < len(prompts):
        logger.warning(f"{len(prompts) - len(rows)} prompts are left out: all of their images are judged alike.")
    with atomic_write(folder / PAIRS_FILE) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def best_and_worst(prompts: Sequence[str], scores: Tensor, files: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of prompts whose images differ in their `scores` `[prompts, G]`, with both scores of each pair."""
    rows: list[dict[str, Any]] = []
    for index, (prompt, group) in enumerate(zip(prompts, scores, strict=True)):
        best, worst = int(group.argmax()), int(group.argmin())
        if group[best] > group[worst]:
            pair = (files[index * len(group) + at] for at in (best, worst))
            row = dict(zip(FIELDS, (prompt, *pair), strict=True))
            rows.append(row | {"scores": [float(group[best]), float(group[worst])]})
    return rows
