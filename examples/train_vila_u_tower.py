"""Train VILA-U's vision tower: pictures to codes that mean what the caption says, and back (arXiv 2409.04429).

    python examples/train_vila_u_tower.py --data photos --siglip google/siglip-large-patch16-256 --output_dir out/tower
    python examples/train_vila_u_tower.py --data photos --pretrained out/tower/model --tokenizer some/tokenizer ...

The folder holds images and their captions, in any layout that docs/data.md lists; `--data` may also be WebDataset tars
or a dataset of the Hub. Another script calls
`train(config, batches, model, tokenizer)` with any iterable of batches. The loss is

    contrastive + reconstruction (L1 + perceptual) + 0.25 commitment;   the codebook follows by moving averages.

The paper starts from SigLIP and freezes its text tower; from nothing, both losses together need easy data.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import AutoTokenizer, SiglipModel

from diffusers_sana import VilaUVisionModel
from diffusers_sana.files import read_json
from diffusers_sana.loaders.vila_u.siglip import load_siglip, tower_config_like
from diffusers_sana.models.vila_u.configuration_vila_u import VilaUVisionConfig
from diffusers_sana.models.vila_u.vision_vila_u import VilaUVisionModelOutput
from diffusers_sana.training.config import option, parse_config, run_script
from diffusers_sana.training.data.batches import Batches, make_loader
from diffusers_sana.training.data.images import load_images
from diffusers_sana.training.data.sources import Captions, ImageDataConfig
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.objectives.perceptual import PerceptualLoss
from diffusers_sana.training.optimizers import make_adamw
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.state_files import copy_with_weights, sub_state


@dataclass(kw_only=True)
class VilaUTowerTrainingConfig(ImageDataConfig):
    """Settings of a tower's training. The paper gives the sum of the losses only; the rest is RQ-VAE's recipe."""

    output_dir: str = option(
        "outputs/vila_u_tower", "folder for checkpoints, samples, log and result", changeable=True
    )
    siglip: str = option("", "SiglipModel to begin from, a folder or repository (command line only)")
    pretrained: str = option("", "VilaUVisionModel to continue from (command line only)")
    model_config: str = option("", "config.json of a new VilaUVisionModel (command line only)")
    tokenizer: str = option("", "of the text tower; default: that of `siglip` (command line only)")
    batch_size: int = option(64, "images a batch and process (command line only)")
    num_workers: int = option(4, "processes that load images (command line only)", changeable=True)
    learning_rate: float | None = option(4e-5, "peak learning rate", changeable=True)
    betas: tuple[float, float] | None = option((0.5, 0.9), "AdamW betas", changeable=True)
    weight_decay: float | None = option(0.0, "AdamW weight decay of matrices and kernels", changeable=True)
    reconstruction_weight: float = option(1.0, "weight of L1 and perceptual loss together", changeable=True)
    perceptual_weight: float = option(1.0, "weight of the perceptual loss beside L1; 0 leaves it out", changeable=True)
    perceptual_every: int = option(
        1, "steps between uses of the perceptual loss, its weight raised to match", changeable=True
    )
    contrastive_weight: float = option(
        1.0, "weight of the contrastive loss; 0 leaves it out, and needs no text tower", changeable=True
    )
    decoder_only: bool = option(False, "train the pixel decoder alone: no code changes, so it can be done at any time")
    train_text_tower: bool = option(False, "train the text tower too: for towers that begin from nothing")
    initial_count: float = option(0.0, "use counts the codebook begins with: 0 if new, 100 if trained")


class TowerWithText(nn.Module):
    """One module for what trains, so that DDP and FSDP see one forward a step."""

    def __init__(self, tower: VilaUVisionModel):
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor, input_ids: Tensor | None) -> tuple[VilaUVisionModelOutput, Tensor | None]:
        """Pictures `[B, 3, H, W]` and texts `[B, S]` to the tower's output and the contrastive loss."""
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
) -> None:
    """Train `model`; the result is saved in `config.output_dir/model`.

    Args:
        config: the settings.
        batches: iterable of batches, or a function from the number of batches already used to the iterable of those
            that follow, which makes a resumed run exact. A batch holds `pixel_values` `[B, 3, H, W]` in [-1, 1] and,
            for the contrastive loss, `text`, a list of B strings.
        model: with semantic head and text tower, unless `config.contrastive_weight` is 0.
        tokenizer: of the text tower.
        perceptual_network: module from images to a list of feature maps; default: seeded random features.

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
    optimizer = make_adamw(
        [p for p in trained.parameters() if p.requires_grad], config.learning_rate, config.betas, config.weight_decay
    )
    trained, optimizer = accelerator.prepare(trained, optimizer)
    perceptual = PerceptualLoss(perceptual_network).to(accelerator.device)
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

    loop = TrainingLoop(config, accelerator, [trained], [optimizer], save=save, sample=sample)
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
            accelerator.backward(loss * loop.weight)
            if accelerator.sync_gradients and config.max_grad_norm:
                accelerator.clip_grad_norm_(trained.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
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
    if config.decoder_only:
        raise ValueError("`contrastive_weight` must be 0 with `decoder_only`, which trains nothing it could reach.")
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


def make_model(config: VilaUTowerTrainingConfig) -> tuple[VilaUVisionModel, Any]:
    """The tower and the tokenizer that the command line names."""
    if sum(map(bool, (config.siglip, config.pretrained, config.model_config))) != 1:
        raise ValueError("exactly one of `siglip`, `pretrained` and `model_config` must be given. Pass one of them.")
    place = config.tokenizer or config.siglip
    tokenizer = AutoTokenizer.from_pretrained(place) if place and config.contrastive_weight else None
    if config.pretrained:
        return VilaUVisionModel.from_pretrained(config.pretrained), tokenizer
    if config.siglip:
        siglip = SiglipModel.from_pretrained(config.siglip)
        return load_siglip(VilaUVisionModel(tower_config_like(siglip.config)), siglip), tokenizer
    return VilaUVisionModel(VilaUVisionConfig(**read_json(config.model_config))), tokenizer


def main(argv: list[str] | None = None) -> None:
    """The command line: a captioned image folder, and a SigLIP, a trained tower or a new one's config."""
    config = parse_config(VilaUTowerTrainingConfig, argv, description=__doc__)
    make_accelerator(config)
    set_seed(config.seed)
    model, tokenizer = make_model(config)
    captions: Captions = "expected" if config.contrastive_weight else "ignored"
    dataset = load_images(config, [(model.config.image_size, model.config.image_size)], captions)
    train(config, make_loader(dataset, config.batch_size, config.seed, config.num_workers), model, tokenizer)


if __name__ == "__main__":
    run_script(main)
