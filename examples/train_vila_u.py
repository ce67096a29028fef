"""Train VILA-U on chats: to answer about pictures and to draw them (arXiv 2409.04429, section 3.2).

    python examples/train_vila_u.py --data chats --pretrained outputs/start --output_dir outputs/vila_u

`--pretrained` is a folder of model and processor; the vision tower in it stays as it is (`train_vila_u_tower.py` makes
one). The data folder holds pictures and `chats.jsonl`, a chat a line in the form of transformers' chat templates:

    [{"role": "user", "content": [{"type": "text", "text": "a red cat"}]},
     {"role": "assistant", "content": [{"type": "image", "image": "cat.png"}]}]

What the assistant says or shows is learned; so a chat with the picture on the user's side teaches to answer. Another
script calls `train(config, batches, model, processor)` with any iterable of batches. The loss is

    cross-entropy of the text + that of the codes through the depth transformer, each a mean over its own targets,

over those of all batches of an optimizer step in all processes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import AutoProcessor

from diffusers_sana import VilaUForConditionalGeneration, VilaUProcessor
from diffusers_sana.models.vila_u.loss_vila_u import find_targets
from diffusers_sana.training.config import TrainingConfig, option, parse_config, run_script
from diffusers_sana.training.data.batches import Batches, make_loader
from diffusers_sana.training.data.chats import ChatCollator, ChatFolder, encode_pictures
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.optimizers import make_adamw
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.state_files import copy_with_weights, sub_state


@dataclass(kw_only=True)
class VilaUTrainingConfig(TrainingConfig):
    """Settings of the training of language model, projector and depth transformer; the defaults are the paper's."""

    output_dir: str = option("outputs/vila_u", "folder for checkpoints, samples, log and result", changeable=True)
    data: str = option("", "folder of pictures with chats.jsonl (command line only)", changeable=True)
    allow_outside: bool = option(
        False, "read images outside of `data` that its chats name (command line only)", changeable=True
    )
    pretrained: str = option("", "folder or repository of model and processor (command line only)")
    cache_codes: bool = option(
        True, "encode every picture once, before the training (command line only)", changeable=True
    )
    batch_size: int = option(64, "chats a batch and process (command line only)")
    num_workers: int = option(4, "processes that load chats (command line only)", changeable=True)
    learning_rate: float | None = option(5e-5, "peak learning rate; the paper's fine-tuning has 1e-4", changeable=True)
    lr_schedule: str = option("cosine", "`constant` or `cosine`, after the warm-up", changeable=True)
    betas: tuple[float, float] | None = option((0.9, 0.999), "AdamW betas", changeable=True)
    weight_decay: float | None = option(0.0, "AdamW weight decay of matrices and kernels", changeable=True)
    caption_dropout: float = option(
        0.1, "share of the prompts of pictures that are emptied, for guidance", changeable=True
    )
    cell_dropout: float = option(
        0.0, "hide up to this share of a picture's cells from the language model; see docs", changeable=True
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass to save memory", changeable=True
    )
    sample_prompts: tuple[str, ...] = option((), "prompts of the sample grids; none: no grids", changeable=True)
    sample_guidance: float = option(3.0, "guidance scale of the sample grids", changeable=True)


class WithHiddenCells(nn.Module):
    """The model, and in training pictures of which the language model does not see all cells.

    From the cells before it a cell is guessed more easily than from the prompt, so that a short training learns what a
    prompt means from the first cells of an object only. Of each picture a share is hidden, drawn anew from 0 to
    `cell_dropout`: inputs of zeros. All cells are still to be predicted.
    """

    def __init__(self, model: VilaUForConditionalGeneration, cell_dropout: float):
        super().__init__()
        self.model, self.cell_dropout = model, cell_dropout

    def forward(self, pixel_values: Tensor | None = None, image_codes: Tensor | None = None, **batch: Any) -> Any:
        """As `VilaUForConditionalGeneration.forward`."""
        if pixel_values is None and image_codes is None:
            return self.model(**batch)
        features = self.model.get_image_features(pixel_values, image_codes, return_dict=True)
        share = torch.rand(len(features.codes), 1, 1, device=features.codes.device) * self.cell_dropout
        is_seen = torch.rand(*features.codes.shape[:2], 1, device=share.device) >= share
        features.pooler_output = features.pooler_output * is_seen
        return self.model(mm_encoder_outputs={"image": features}, **batch)


def train(
    config: VilaUTrainingConfig,
    batches: Batches,
    model: VilaUForConditionalGeneration,
    processor: VilaUProcessor,
) -> None:
    """Train all of `model` but its vision tower; model and processor are saved in `config.output_dir/model`.

    Args:
        config: the settings.
        batches: iterable of batches, or a function from the number of batches already used to the iterable of those
            that follow, which makes a resumed run exact. A batch holds the arguments of `model.forward`, `labels`
            among them, as `ChatCollator` makes them of chats.
        model: new or trained.
        processor: for the sample grids, and to be saved beside the model.
    """
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for layer in (*model.model.language_model.layers, *model.depth_transformer.layers):
            layer.compile()
    trained = WithHiddenCells(model, config.cell_dropout).train()
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = make_adamw(parameters, config.learning_rate, config.betas, config.weight_decay)
    trained, optimizer = accelerator.prepare(trained, optimizer)

    def sample(path: Path) -> None:
        if not config.sample_prompts or not accelerator.is_main_process:
            return
        inputs = processor(text=list(config.sample_prompts), generation_mode="image").to(accelerator.device)
        generator = torch.Generator().manual_seed(config.seed)
        model.eval()
        codes = model.generate(
            **inputs, generation_mode="image", guidance_scale=config.sample_guidance, generator=generator
        )
        model.train()
        save_image_grid(model.decode_image_tokens(codes), path)

    def save(folder: Path) -> None:
        state = sub_state(accelerator.get_state_dict(trained), "model.")
        if accelerator.is_main_process:
            copy_with_weights(model, state).save_pretrained(folder)
            processor.save_pretrained(folder)

    def count_targets(batch: dict[str, Any]) -> dict[str, int]:
        """Tokens and codes to be learned from a batch: the losses are means over those of the whole step."""
        is_placeholder = model.model.is_placeholder(batch["input_ids"])
        is_text, is_visual = find_targets(
            batch["labels"], is_placeholder, batch.get("attention_mask"), batch.get("position_ids")
        )
        num_codebooks = model.config.depth_config.num_codebooks
        return {"text": int(is_text.sum()), "codes": int(is_visual.sum()) * num_codebooks}

    loop = TrainingLoop(config, accelerator, [trained], [optimizer], save=save, sample=sample)
    for batch in loop.run(batches, count_targets):
        text, codes = loop.mean_counts["text"], loop.mean_counts["codes"]
        with accelerator.accumulate(trained):
            output = trained(**batch, num_text_targets=text, num_code_targets=codes)
            accelerator.backward(output.loss)
            if accelerator.sync_gradients and config.max_grad_norm:
                accelerator.clip_grad_norm_(trained.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        terms = {"text": output.text_loss, "codes": output.visual_loss}
        loop.report(images=len(batch["input_ids"]), loss=output.loss, **terms)


def main(argv: list[str] | None = None) -> None:
    """The command line: a folder of chats, and the folder of a model and its processor."""
    config = parse_config(VilaUTrainingConfig, argv, description=__doc__)
    if not config.pretrained:
        raise ValueError("`pretrained` must be a folder or repository of a VILA-U, got ''. Pass --pretrained.")
    device = make_accelerator(config).device
    set_seed(config.seed)
    model = VilaUForConditionalGeneration.from_pretrained(config.pretrained)
    processor = AutoProcessor.from_pretrained(config.pretrained)
    chats = ChatFolder(config.data, config.allow_outside)
    if config.cache_codes:
        tower = model.model.vision_tower.to(device)
        chats.codes = encode_pictures(
            chats.pictures, tower, processor.image_processor, Path(config.output_dir) / "codes.safetensors"
        )
    collate = ChatCollator(processor, config.caption_dropout)
    train(config, make_loader(chats, config.batch_size, config.seed, config.num_workers, collate), model, processor)


if __name__ == "__main__":
    run_script(main)
