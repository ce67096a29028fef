"""Training of VILA-U on chats: to answer questions about images and to generate them (arXiv 2409.04429, section 3.2).

The loss is

    cross-entropy of the text + that of the token ids through the depth transformer, each a mean over its own targets,

over those of all batches of an optimizer step in all processes.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import AutoProcessor

from diffusers_sana.models.vila_u.loss_vila_u import find_targets
from diffusers_sana.models.vila_u.modeling_vila_u import VilaUForConditionalGeneration
from diffusers_sana.models.vila_u.processing_vila_u import VilaUProcessor
from diffusers_sana.training.data.batches import Batches, make_loader
from diffusers_sana.training.data.chats import ChatCollator, ChatFolder, encode_images
from diffusers_sana.training.loop import TrainingLoop, make_accelerator
from diffusers_sana.training.optimizers import optimizer_of
from diffusers_sana.training.plots import save_image_grid
from diffusers_sana.training.recipes.vila_u_options import VilaUDataOptions, VilaUModelOptions, VilaUTrainingConfig
from diffusers_sana.training.state_files import copy_with_weights, sub_state


class MaskedImageTokens(nn.Module):
    """The model, with some image tokens hidden from its language model in training.

    An image token is easier to predict from the tokens before it than from the prompt, so that a short training learns
    the meaning of a prompt only from the first tokens of an object. A random fraction of each image, from 0 to
    `cell_dropout`, is hidden: the inputs are zeros. All tokens are still to be predicted.
    """

    def __init__(self, model: VilaUForConditionalGeneration, cell_dropout: float):
        super().__init__()
        self.model, self.cell_dropout = model, cell_dropout

    def forward(self, pixel_values: Tensor | None = None, image_codes: Tensor | None = None, **batch: Any) -> Any:
        """As `VilaUForConditionalGeneration.forward`."""
        if pixel_values is None and image_codes is None:
            return self.model(**batch)
        features: Any = self.model.get_image_features(pixel_values, image_codes, return_dict=True)
        fraction = torch.rand(len(features.codes), 1, 1, device=features.codes.device) * self.cell_dropout
        is_seen = torch.rand(*features.codes.shape[:2], 1, device=fraction.device) >= fraction
        features.pooler_output = features.pooler_output * is_seen
        return self.model(mm_encoder_outputs={"image": features}, **batch)


def train(
    config: VilaUTrainingConfig,
    batches: Batches,
    model: VilaUForConditionalGeneration,
    processor: VilaUProcessor,
    options: tuple[Any, ...] = (),
) -> None:
    """Train all of `model` but its vision tower; model and processor are saved in `config.output_dir/model`.

    Args:
        config: a VilaUTrainingConfig.
        batches: see `Batches`. A batch holds the arguments of `model.forward`, `labels`
            among them, as `ChatCollator` makes them of chats.
        model: new or trained.
        processor: for the sample grids, and to be saved beside the model.
        options: groups of options for data and models, that checkpoints record; see `TrainingLoop`.
    """
    accelerator = make_accelerator(config)
    set_seed(config.seed, device_specific=True)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for layer in (*model.model.language_model.layers, *model.depth_transformer.layers):
            layer.compile()
    trained = MaskedImageTokens(model, config.cell_dropout).train()
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(config, parameters)
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
        """Targets of a batch, text tokens and image token ids: the losses are means over those of the whole step."""
        is_placeholder = model.model.is_placeholder(batch["input_ids"])
        is_text, is_visual = find_targets(
            batch["labels"], is_placeholder, batch.get("attention_mask"), batch.get("position_ids")
        )
        num_codebooks = model.config.depth_config.num_codebooks
        return {"text": int(is_text.sum()), "codes": int(is_visual.sum()) * num_codebooks}

    loop = TrainingLoop(config, accelerator, [trained], [optimizer], save=save, sample=sample, options=options)
    for batch in loop.run(batches, count_targets):
        text, codes = loop.mean_counts["text"], loop.mean_counts["codes"]
        with accelerator.accumulate(trained):
            output = trained(**batch, num_text_targets=text, num_code_targets=codes)
            accelerator.backward(output.loss)  # a mean over the targets of the whole step, so it has no weight
            loop.update()
        terms = {"text": output.text_loss, "codes": output.visual_loss}
        loop.report(images=len(batch["input_ids"]), loss=output.loss, **terms)


def run(config: VilaUTrainingConfig, data: VilaUDataOptions, model: VilaUModelOptions) -> None:
    """Train a model on a folder of chats: what `examples/train_vila_u.py` does."""
    device = make_accelerator(config).device
    set_seed(config.seed)
    vila_u = VilaUForConditionalGeneration.from_pretrained(model.pretrained)
    processor = AutoProcessor.from_pretrained(model.pretrained)
    chats = ChatFolder(data.data, data.allow_outside)
    if data.cache_codes:
        tower = vila_u.model.vision_tower.to(device)
        chats.codes = encode_images(
            chats.images, tower, processor.image_processor, Path(config.output_dir) / "codes.safetensors"
        )
    collate = ChatCollator(processor, config.caption_dropout)
    batches = make_loader(chats, data.batch_size, config.seed, data.num_workers, collate)
    train(config, batches, vila_u, processor, options=(data, model))
