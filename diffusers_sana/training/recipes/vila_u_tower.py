"""Training of VILA-U's vision tower: images to token ids that mean what the caption says, and back (arXiv 2409.04429).

    contrastive + reconstruction (L1 + perceptual) + 0.25 commitment;   the codebook follows by moving averages.

The paper starts from SigLIP and freezes its text tower; from nothing, both losses together need easy data.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import AutoTokenizer, SiglipModel

from diffusers_sana.files import read_json
from diffusers_sana.loaders.vila_u.siglip import load_siglip, tower_config_like
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUVisionConfig
from diffusers_sana.models.vila_u.vision_vila_u import VilaUVisionModel, VilaUVisionModelOutput
from diffusers_sana.training.data.batches import Batches, make_loader
from diffusers_sana.training.data.images import load_images
from diffusers_sana.training.data.sources import Captions
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.perceptual import make_perceptual
from diffusers_sana.training.optimizers import optimizer_of
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.vila_u_options import (
    VilaUTowerDataOptions,
    VilaUTowerModelOptions,
    VilaUTowerTrainingConfig,
)
from diffusers_sana.training.state_files import copy_with_weights, sub_state


class TowerWithText(nn.Module):
    """One module for what trains, so that DDP and FSDP see one forward per step."""

    def __init__(self, tower: VilaUVisionModel):
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor, input_ids: Tensor | None) -> tuple[VilaUVisionModelOutput, Tensor | None]:
        """Images `[B, 3, H, W]` and texts `[B, S]` to the tower's output and the contrastive loss."""
        output = self.tower(pixel_values)
        if input_ids is None:
            return output, None
        return output, self.tower.contrastive_loss(output.image_embeds, self.tower.get_text_features(input_ids))


def train(
    config: VilaUTowerTrainingConfig,
    batches: Batches,
    model: VilaUVisionModel,
    tokenizer: Any = None,
    perceptual_network: nn.Module | None = None,
    options: tuple[Any, ...] = (),
) -> None:
    """Train `model`; the result is saved in `config.output_dir/model`.

    Args:
        config: a VilaUTowerTrainingConfig.
        batches: see `Batches`. A batch holds `pixel_values` `[B, 3, H, W]` in [-1, 1] and,
            for the contrastive loss, `text`, a list of B strings.
        model: with semantic head and text tower, unless `config.contrastive_weight` is 0.
        tokenizer: of the text tower.
        perceptual_network: module from images to a list of feature maps; default: as `config.perceptual` says.
        options: groups of options for data and models, that checkpoints record; see `TrainingLoop`.

    Raises:
        ValueError: the contrastive loss is wanted, and a part for it is missing.
    """
    check_contrastive_parts(config, model, tokenizer)
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    choose_what_trains(config, model)
    if config.compile:
        model.decoder.compile()
    trained = TowerWithText(model).train()
    optimizer = optimizer_of(config, [p for p in trained.parameters() if p.requires_grad])
    trained, optimizer = accelerator.prepare(trained, optimizer)
    perceptual = make_perceptual(config.perceptual, perceptual_network).to(accelerator.device)
    shown: list[Tensor] = []  # the first batch of the run, for the sample grids

    def sample(path: Path) -> None:
        trained.eval()
        with torch.no_grad():
            reconstructed = trained(shown[0], None)[0].reconstruction
        trained.train()
        if accelerator.is_main_process:
            save_image_grid(torch.stack([shown[0], reconstructed.float()], dim=1).flatten(0, 1), path)

    def save(folder: Path) -> None:
        state = sub_state(accelerator.get_state_dict(trained), "tower.")
        if accelerator.is_main_process:
            published = {name: value for name, value in state.items() if name not in model._keys_to_ignore_on_save}
            copy_with_weights(model, published).save_pretrained(folder)

    loop = TrainingLoop(config, accelerator, [trained], [optimizer], save=save, sample=sample, options=options)
    for batch in loop.run(batches):
        pixel_values = batch["pixel_values"]
        shown = shown or [pixel_values[:8]]
        input_ids = None
        if config.contrastive_weight:
            input_ids = tokenize(tokenizer, batch["text"], model.config).to(accelerator.device)
        with accelerator.accumulate(trained):
            output, contrastive = trained(pixel_values, input_ids)
            reconstructed = output.reconstruction.float()
            terms = {"l1": F.l1_loss(reconstructed, pixel_values), "commitment": output.commitment_loss}
            reconstruction = terms["l1"]
            if config.perceptual_weight and loop.step % config.perceptual_every == 0:
                with accelerator.autocast():
                    terms["perceptual"] = perceptual(reconstructed, pixel_values)
                weight = config.perceptual_weight * config.perceptual_every
                reconstruction = reconstruction + weight * terms["perceptual"]
            loss = config.reconstruction_weight * reconstruction
            loss = loss + model.config.commitment_loss_weight * terms["commitment"]
            if contrastive is not None:
                terms["contrastive"] = contrastive
                loss = loss + config.contrastive_weight * contrastive
            terms["codes_used"] = codes_used(output.codes, model.config.codebook_size)
            loop.backward(loss)
            loop.update()
        loop.report(images=len(pixel_values), loss=loss, **terms)


def choose_what_trains(config: VilaUTowerTrainingConfig, model: VilaUVisionModel) -> None:
    """Freezes what the settings say, and starts the moving averages of the codebook where it is to move."""
    model.requires_grad_(not config.decoder_only)
    if config.decoder_only:
        model.post_quant_conv.requires_grad_(True)
        model.decoder.requires_grad_(True)
        return
    if model.text_model is not None:
        model.text_model.requires_grad_(config.train_text_tower)
    model.quantizer.start_ema(config.initial_count)


def check_contrastive_parts(config: VilaUTowerTrainingConfig, model: VilaUVisionModel, tokenizer: Any) -> None:
    """Raises a ValueError that names the part without which there can be no contrastive loss."""
    if not config.contrastive_weight:
        return
    missing = [
        name
        for name, part in (
            ("`use_semantic_head=True` in the model's config", model.semantic_head),
            ("`use_text_tower=True` in the model's config", model.text_model),
            ("`tokenizer`", tokenizer),
        )
        if part is None
    ]
    if missing:
        raise ValueError(f"the contrastive loss needs {' and '.join(missing)}. Or set `contrastive_weight` to 0.")


def tokenize(tokenizer: Any, texts: list[str], config: VilaUVisionConfig) -> Tensor:
    """Texts to ids `[B, text_max_position_embeddings]`, padded and cut to full length, as SigLIP reads them."""
    length = config.text_max_position_embeddings
    tokens = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, padding_side="right", return_tensors="pt"
    )
    return tokens.input_ids


def codes_used(codes: Tensor, codebook_size: int) -> Tensor:
    """How much of the codebook `codes` use, from 1/K to 1: exp(entropy) / K."""
    shares = torch.bincount(codes.flatten(), minlength=codebook_size).float() / codes.numel()
    return torch.special.entr(shares).sum().exp() / codebook_size


def make_model(config: VilaUTowerTrainingConfig, model: VilaUTowerModelOptions) -> tuple[VilaUVisionModel, Any]:
    """The tower and the tokenizer that the options name."""
    place = model.tokenizer or model.siglip
    tokenizer = AutoTokenizer.from_pretrained(place) if place and config.contrastive_weight else None
    if model.pretrained:
        return VilaUVisionModel.from_pretrained(model.pretrained), tokenizer
    if model.siglip:
        siglip = SiglipModel.from_pretrained(model.siglip)
        return load_siglip(VilaUVisionModel(tower_config_like(siglip.config)), siglip), tokenizer
    return VilaUVisionModel(VilaUVisionConfig(**read_json(model.model_config))), tokenizer


def run(config: VilaUTowerTrainingConfig, data: VilaUTowerDataOptions, model: VilaUTowerModelOptions) -> None:
    """Train a SigLIP, a trained tower or a new one on captioned images: `examples/train_vila_u_tower.py`."""
    make_accelerator(config)
    set_seed(config.seed)
    tower, tokenizer = make_model(config, model)
    captions: Captions = "expected" if config.contrastive_weight else "ignored"
    dataset = load_images(data, [(tower.config.image_size, tower.config.image_size)], captions)
    batches = make_loader(dataset, data.batch_size, config.seed, data.num_workers)
    train(config, batches, tower, tokenizer, options=(data, model))
