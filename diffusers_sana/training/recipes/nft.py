"""Post-training of Sana by rewards: a LoRA learns by DiffusionNFT (arXiv 2509.16117) what a judge prefers.

A step generates a group of images for each prompt with the sampling policy, an EMA of the one that trains, compares
them by the reward, and trains on them. The images may come from a 4-bit copy, which is cheaper. Then only the best and
the worst of large groups are generated again in 16 bits and trained on (Sol-RL, arXiv 2604.06916).

Legend: P prompts of a batch, B images of them, C latent channels, h/w latent height and width, L text vectors, D text
width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffusers_sana.checks import check_computed, check_size
from diffusers_sana.evaluation.checks import Check, read_checks
from diffusers_sana.evaluation.judges import Judge, judged, make_judge, mixed
from diffusers_sana.files import read_lines
from diffusers_sana.quantizers.svdquant.api import quantize
from diffusers_sana.quantizers.svdquant.config import SVDQuantConfig
from diffusers_sana.training.data.batches import Batches, make_loader
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.flow_matching import (
    ConditionedTransformer,
    noisy_batch,
    sample_euler,
    sample_guided,
)
from diffusers_sana.training.objectives.nft import most_contrastive, nft_losses, old_decay, optimalities
from diffusers_sana.training.optimizers import optimizer_of
from diffusers_sana.training.recipes.adapter import (
    add_adapter_of,
    check_flow_matching,
    check_flow_shift,
    load_base,
    quantize_base,
    save_adapter,
)
from diffusers_sana.training.recipes.post_training_options import (
    NftDataOptions,
    NftModelOptions,
    NftTrainingConfig,
    RewardOptions,
)
from diffusers_sana.training.recipes.text_to_image import (
    NUM_SAMPLES,
    Encoders,
    Prompt,
    SanaInputs,
    doubled,
    freeze,
    prepare_blocks,
    sample_noise,
    save_guided_samples,
)


def train(
    config: NftTrainingConfig,
    batches: Batches,
    transformer: Any,
    encoders: Encoders,
    reward: Judge,
    resolution: int = 512,
    rollout_transformer: Any = None,
    options: tuple[Any, ...] = (),
) -> None:
    """Train an adapter for `transformer`, which keeps its own weights; saved in `config.output_dir/model`.

    Args:
        config: a NftTrainingConfig.
        batches: see `Batches`. A batch holds `text`, P strings, and may hold their `prompt_embeds` `[P, L, D]` and
            `prompt_attention_mask` `[P, L]`.
        transformer: a SanaTransformer2DModel, dense or quantized, without adapters. Afterwards it has the trained one.
        encoders: an AutoencoderDC, and what encodes the text of batches without `prompt_embeds`.
        reward: from images `[B, 3, H, W]` in [0, 1] and B prompts to B numbers, higher ones for better images; see
            `evaluation.judges`.
        resolution: side of the square images in pixels.
        rollout_transformer: generates the images that are compared: a quantized copy of `transformer`, without
            adapters. Afterwards it has that of the sampling policy. None: `transformer`.
        options: groups of options for data and models, that checkpoints record; see `TrainingLoop`.

    Raises:
        TypeError: `reward` cannot be called.
        ValueError: the transformer is one of SANA-Sprint, `flow_shift` or the autoencoder is not given, `resolution`
            is no multiple of what the autoencoder compresses, a batch has no `text`, the reward does not return B
            finite numbers, or the Accelerator is set to FSDP.
    """
    check_parts(config, transformer, encoders, reward)
    compression = 2 ** (len(encoders.vae.config.encoder_block_out_channels) - 1)
    check_size("resolution", resolution, compression)
    accelerator = make_accelerator(config)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("`distributed_type` must not be FSDP: weights of two policies alternate. Use DDP.")
    set_seed(config.seed)
    add_adapter_of(config, transformer)
    if rollout_transformer is not None:
        add_adapter_of(config, rollout_transformer)
        freeze(accelerator.device, rollout_transformer)
    set_seed(config.seed, device_specific=True)
    inputs = SanaInputs(config, accelerator.device, encoders)
    prepare_blocks(config, transformer)
    model = ConditionedTransformer(transformer).train()
    optimizer = optimizer_of(config, list(trained_parameters(transformer).values()))
    model, optimizer = accelerator.prepare(model, optimizer)
    policy = trained_parameters(transformer)
    old = {name: parameter.detach().clone() for name, parameter in policy.items()}
    side = resolution // compression
    shape = (transformer.config.in_channels, side, side)
    sampler = Sampler(config, accelerator, model, rollout_transformer, encoders.vae, reward, shape)
    shown: dict[str, Any] = {}  # what the sample grids show: prompts and noise

    def sample(path: Path) -> None:
        predict = partial(model, prompt=doubled(shown["prompt"]))
        save_guided_samples(path, cast(Any, config), accelerator, model, inputs.vae, predict, shown["noise"])

    def save(folder: Path) -> None:
        if accelerator.is_main_process:
            save_adapter(folder, transformer)

    loop = TrainingLoop(
        config,
        accelerator,
        [model],
        [optimizer],
        save=save,
        sample=sample,
        keep_frozen=False,  # the base does not change, and may be large
        options=options,
        tensors=old,
    )
    for batch in loop.run(batches):
        if "text" not in batch:
            raise ValueError("`batches` must hold `text`, which the reward needs, got none. Add the prompts.")
        prompt = inputs.prompts(batch)
        shown = shown or first_prompts(config, inputs, prompt, shape)
        images = sampler.roll_out(prompt, batch["text"], policy, old)
        with accelerator.accumulate(model):
            terms = learn(config, loop, model, transformer, policy, old, images)
            loop.update()
        if accelerator.sync_gradients:
            decay = old_decay(loop.step, config.old_decay_rate, config.old_decay_max)
            for name, parameter in policy.items():
                old[name].lerp_(parameter.detach(), 1 - decay)
        loop.report(images=len(images.latents), **terms, reward=images.reward, reward_std=images.reward_std)


def check_parts(config: NftTrainingConfig, transformer: Any, encoders: Encoders, reward: Judge) -> None:
    """Raise a TypeError or ValueError, as `train` does, for what cannot be trained or trained with."""
    if not callable(reward):
        raise TypeError(f"`reward` must be a function of images and prompts, got {type(reward).__name__}.")
    check_flow_matching(transformer)
    check_flow_shift(config)
    if encoders.vae is None:
        raise ValueError("`encoders` must have a `vae`, which decodes images for the reward, got None. Pass it.")


@dataclass(frozen=True)
class RollOut:
    """Images to train on.

    Attributes:
        latents: `[B, C, h, w]`, scaled.
        prompt: of each of them.
        optimality: `[B]`, see `optimalities`.
        reward, reward_std: mean reward of all images that were generated first, and mean deviation in a group.
    """

    latents: Tensor
    prompt: Prompt
    optimality: Tensor
    reward: Tensor
    reward_std: Tensor


class Sampler:
    """Generates groups of images with the sampling policy, and compares them.

    Args:
        config: says how.
        accelerator: that prepared `model`.
        model: a ConditionedTransformer, prepared.
        rollout: a transformer that generates in its place, with an adapter of the same names; or None.
        vae: decodes.
        reward: as in `train`.
        shape: of latents, `(C, h, w)`.
    """

    def __init__(
        self,
        config: NftTrainingConfig,
        accelerator: Accelerator,
        model: nn.Module,
        rollout: Any,
        vae: Any,
        reward: Judge,
        shape: tuple[int, int, int],
    ):
        self.config, self.accelerator, self.vae, self.reward, self.shape = config, accelerator, vae, reward, shape
        self.model = accelerator.unwrap_model(model)
        self.rollout = None if rollout is None else ConditionedTransformer(rollout).eval()

    @torch.no_grad()
    def roll_out(
        self, prompt: Prompt, texts: list[str], policy: Mapping[str, nn.Parameter], old: Mapping[str, Tensor]
    ) -> RollOut:
        """Images of P prompts by the policy `old`, whose values stand in for those of `policy` meanwhile."""
        group, kept = self.config.group_size, self.config.kept_per_group or self.config.group_size
        embeds, mask = (part.repeat_interleave(group, 0) for part in prompt)
        texts = [text for text in texts for _ in range(group)]
        noise = torch.randn(len(texts), *self.shape, device=self.accelerator.device)
        if self.rollout is not None:
            copy_values(adapter_parameters(self.rollout.transformer), old)
        self.model.eval()
        with values_of(policy, old):
            latents = self._generate(self.rollout or self.model, noise, (embeds, mask))
            rewards = self._judge(latents, texts)
            reward, spread = rewards.mean(), rewards.view(-1, group).std(1, correction=0).mean()
            if kept < group:
                chosen = most_contrastive(rewards, group, kept)
                embeds, mask, latents = embeds[chosen], mask[chosen], latents[chosen]
                rewards = rewards[chosen]
                if self.rollout is not None:  # explored in few bits, trained in 16
                    latents = self._generate(self.model, noise[chosen], (embeds, mask))
                    rewards = self._judge(latents, [texts[index] for index in chosen.tolist()])
        self.model.train()
        std = self.accelerator.gather(rewards).std(correction=0) if self.config.advantage_std == "batch" else None
        optimality = optimalities(rewards, kept, self.config.advantage_clip, std)
        return RollOut(latents, (embeds, mask), optimality, reward, spread)

    def _generate(self, model: nn.Module, noise: Tensor, prompt: Prompt) -> Tensor:
        config, shift = self.config, cast(float, self.config.flow_shift)
        parts = []
        for part, *vectors in zip(*(each.split(config.chunk_size) for each in (noise, *prompt)), strict=True):
            embeds, mask = vectors
            with self.accelerator.autocast():
                if config.rollout_guidance == 1:
                    predict = partial(model, prompt=(embeds, mask))
                    parts.append(sample_euler(predict, part, config.rollout_steps, shift))
                else:
                    predict = partial(model, prompt=doubled((embeds, mask)))
                    steps = config.rollout_steps
                    parts.append(sample_guided(predict, part, config.rollout_guidance, steps, shift))
        latents = torch.cat(parts).float()
        check_computed("transformer", "latents", latents, latents.dtype)
        return latents

    def _judge(self, latents: Tensor, texts: list[str]) -> Tensor:
        """Rewards `[B]`."""
        images = [
            self.vae.decode(part.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.float()
            for part in latents.split(self.config.chunk_size)
        ]
        return judged(self.reward, (torch.cat(images) / 2 + 0.5).clamp(0, 1), texts).to(latents.device)


def learn(
    config: NftTrainingConfig,
    loop: TrainingLoop,
    model: nn.Module,
    transformer: Any,
    policy: Mapping[str, nn.Parameter],
    old: Mapping[str, Tensor],
    images: RollOut,
) -> dict[str, Tensor]:
    """Compute the gradients of a step, some images at some noise levels at a time.

    Returns:
        The mean `loss`, and `kl`, the mean squared distance from the base's velocity.
    """
    losses, distances = [], []
    share = 1 / (config.levels_per_image * len(images.latents))
    tensors = (images.latents, *images.prompt, images.optimality)
    for _ in range(config.levels_per_image):
        for latents, embeds, mask, optimality in zip(
            *(each.split(config.chunk_size) for each in tensors), strict=True
        ):
            shift = cast(float, config.flow_shift)
            noisy, sigmas, _ = noisy_batch(latents, shift, config.logit_mean, config.logit_std)
            predict = partial(model, noisy, sigmas, (embeds, mask))
            model.eval()
            with torch.no_grad(), values_of(policy, old):  # before the graph of the policy that trains is there
                old_velocity = predict()
            with torch.no_grad(), without_adapter(transformer):
                base_velocity = predict().float()
            model.train()
            velocity = predict()
            distance = (velocity.float() - base_velocity).square().mean((1, 2, 3))
            errors = nft_losses(velocity, old_velocity, noisy, latents, sigmas, optimality, config.nft_beta)
            # Advantages were divided by this number: the size of the loss does not depend on it.
            loss = config.advantage_clip * errors + config.kl_weight * distance
            loop.backward(loss.sum() * share)
            losses.append(loss.detach().sum() * share)
            distances.append(distance.detach().sum() * share)
    return {"loss": torch.stack(losses).sum(), "kl": torch.stack(distances).sum()}


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def adapter_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Those of the adapter, by name."""
    return {name: parameter for name, parameter in transformer.named_parameters() if "lora_" in name}


@torch.no_grad()
def copy_values(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of the same names."""
    for name, value in values.items():
        parameters[name].copy_(value)


@contextmanager
def values_of(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters have these values."""
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    copy_values(parameters, values)
    try:
        yield
    finally:
        copy_values(parameters, kept)


@contextmanager
def without_adapter(transformer: Any) -> Iterator[None]:
    """Inside, the transformer is the base alone."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def first_prompts(
    config: NftTrainingConfig, inputs: SanaInputs, prompt: Prompt, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """What the sample grids of a run show: its `sample_prompts`, or the first ones, and noise."""
    chosen = inputs.prompts({"text": list(config.sample_prompts)}) if config.sample_prompts else prompt
    embeds, mask = (part[:NUM_SAMPLES] for part in chosen)
    return {"prompt": (embeds, mask), "noise": sample_noise((len(embeds), *shape), config.seed, embeds.device)}


class Prompts(Dataset):
    """Prompts as items, for `make_loader`."""

    def __init__(self, prompts: list[str]):
        self.names = prompts
        self.sizes_of_items = [(1, 1)] * len(prompts)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"text": self.names[index]}


def read_prompts(path: Path) -> tuple[list[str], list[Check]]:
    """The prompts of a text file, one per line, or of a .jsonl file of checks, and its checks.

    Raises:
        ValueError: there is none, or a line is not a check.
    """
    if path.suffix == ".jsonl":
        checks = read_checks(path)
        return [check.prompt for check in checks], checks
    prompts = [line.strip() for _, line in read_lines(path) if line.strip()]
    if not prompts:
        raise ValueError(f"`prompts` must be a file with at least one prompt, but {path} has none.")
    return prompts, []


def reward_of(model: RewardOptions, checks: Sequence[Check], device: torch.device) -> Judge:
    """The judge that the options name, or the weighted sum of several."""
    judges = [make_judge(name, checks, str(device)) for name in model.reward]
    return mixed(judges, model.reward_weights or (1.0,) * len(judges))


def run(config: NftTrainingConfig, data: NftDataOptions, model: NftModelOptions) -> None:
    """Train on the prompts of a file for a pipeline: what `examples/train_sana_nft.py` does."""
    prompts, checks = read_prompts(Path(data.prompts))
    device = make_accelerator(config).device
    reward = reward_of(model, checks, device)
    pipe = load_base(config, model.pretrained, device)
    rollout = None
    if model.rollout_quantize != "no":
        rollout = deepcopy(pipe.transformer)
        quantize(rollout, SVDQuantConfig(precision=model.rollout_quantize, rank=model.quantize_rank))
    quantize_base(pipe.transformer, model)
    batches = make_loader(Prompts(prompts), data.batch_size, config.seed, data.num_workers)
    encoders = Encoders.of(pipe)
    train(config, batches, pipe.transformer, encoders, reward, data.resolution, rollout, options=(data, model))
