"""Trains the bundled VILA-U from nothing, unattended, within a time budget.

    python -m examples.train_vila_u_emoji.run --data outputs/emoji.zip --out outputs/vila-u-emoji --minutes 110

Three stages, each resumed where it stopped when the command is given again: the vision tower with its text tower; the
language model, projector and depth transformer on the codes of the tower; the tower's decoder once more, alone, which
leaves the codes as they are. On two cores the last two can run side by side. Then the model is written in 4 bits
under `OUT/model` and judged on held-out prompts under `OUT/evaluation`; in 16 bits it is `OUT/language/model`.
"""

import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig

from diffusers_sana import (
    SVDQuantConfig,
    VilaUForConditionalGeneration,
    VilaUImageProcessor,
    VilaUProcessor,
    VilaUVisionModel,
    quantize,
)
from diffusers_sana.kernels.precision import arithmetic_dtype
from diffusers_sana.training.data.chats import ChatCollator
from diffusers_sana.training.recipes import vila_u, vila_u_tower
from diffusers_sana.training.recipes.options import VilaUTowerTrainingConfig, VilaUTrainingConfig
from examples.train_emoji.common import device, make_parser, make_settings

from .data import QUESTIONS, TAUGHT, EmojiChats, TowerScenes
from .evaluate import evaluate
from .models import RESOLUTION, make_model, make_tower
from .scenes import EmojiArt, EmojiScenes, held_out_scenes
from .tokenizer import make_tokenizer


# All linear layers: 7.7 MB in place of 18.1, and the same images and answers, see docs/checkpoints.md.
QUANTIZATION = SVDQuantConfig(rank=8, modules={"*": "w4a16"})
# Fractions of the time budget.
TOWER, LANGUAGE_MODEL, DECODER = 0.35, 0.5, 0.15
STAGES = ("tower", "model", "decoder", "evaluate")
# The small model generates best with these, see docs/checkpoints.md.
SAMPLING = {"visual_guidance_scale": 1.5, "visual_temperature": 0.5}
COMPILE = True  # the tower's decoder
# By machine: batch size, scenes in the store of shown ones, and how many of these each batch renews (a divisor).
PRESETS = {"cpu": (32, 1024, 2), "cuda": (256, 8192, 32)}


def train_tower(art: EmojiArt, out: Path, minutes: float, decoder_of: Path | None = None) -> Path:
    """Trains a tower with its text tower, or only the decoder of `decoder_of`; returns the folder of the model."""
    tokenizer = make_tokenizer(art, list(QUESTIONS))
    scenes = EmojiScenes(art, RESOLUTION, device(), seed=2 if decoder_of else 1, labels=TAUGHT)
    settings = make_settings(
        out,
        minutes,
        learning_rate=8e-4,
        warmup_steps=50,
        perceptual_weight=0.3,
        perceptual_every=2,
        contrastive_weight=0.0 if decoder_of else 0.03,
        decoder_only=decoder_of is not None,
        train_text_tower=True,
        compile=COMPILE,
    )
    torch.manual_seed(0)
    batches = TowerScenes(scenes).batches(PRESETS[device()][0])
    tower = VilaUVisionModel.from_pretrained(decoder_of) if decoder_of else make_tower(tokenizer)
    vila_u_tower.train(VilaUTowerTrainingConfig(**settings), batches, tower, tokenizer)
    return out / "model"


def make_processor(art: EmojiArt) -> VilaUProcessor:
    """The processor of the bundled model."""
    image_processor = VilaUImageProcessor(size={"height": RESOLUTION, "width": RESOLUTION})
    tokenizer = make_tokenizer(art, list(QUESTIONS))
    return VilaUProcessor(image_processor, tokenizer, num_image_tokens=(RESOLUTION // 8) ** 2, num_video_frames=2)


def precision() -> str:
    """bf16 where the processor computes in it: on the CPU that was tried, in 0.6 of the time of fp32."""
    natively = device() == "cuda" or arithmetic_dtype(torch.empty(0, dtype=torch.bfloat16)) == torch.bfloat16
    return "bf16" if natively else "no"


def train_model(art: EmojiArt, tower_folder: Path, out: Path, minutes: float, start: Path | None = None) -> Path:
    """Trains everything but the tower, from nothing or from `start`; returns the folder of model and processor."""
    batch_size, store, renewed = PRESETS[device()]
    processor = make_processor(art)
    torch.manual_seed(0)
    if start:
        model = VilaUForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):
            raise ValueError(f"`start` must be a model in 16 bits, as OUT/language/model is, got {start}.")
    else:
        model = make_model(VilaUVisionModel.from_pretrained(tower_folder), processor.tokenizer)
    scenes = EmojiScenes(art, RESOLUTION, device(), seed=3, labels=TAUGHT)
    chats = EmojiChats(scenes, model.model.vision_tower.to(device()), store, renewed)
    settings = make_settings(
        out,
        minutes,
        learning_rate=1.2e-3,
        warmup_steps=50,
        betas=(0.9, 0.98),
        mixed_precision=precision(),
        weight_decay=0.05,
        ema_decay=0.99,
        cell_dropout=0.9,
        sample_prompts=tuple(scene.prompt for scene in held_out_scenes(TAUGHT, pairs=0)[:16] if not scene.position),
        sample_minutes=10,
    )
    vila_u.train(
        VilaUTrainingConfig(**settings), chats.batches(ChatCollator(processor, 0.1), batch_size), model, processor
    )
    return out / "model"


def publish(trained: Path, out: Path, decoder: Path | None = None) -> None:
    """Writes the model in 4 bits, with another decoder if given, and its sampling settings."""
    model = VilaUForConditionalGeneration.from_pretrained(trained, dtype=torch.bfloat16)
    if decoder is not None:
        tower, last = model.model.vision_tower, VilaUVisionModel.from_pretrained(decoder, dtype=torch.bfloat16)
        tower.decoder.load_state_dict(last.decoder.state_dict())
        tower.post_quant_conv.load_state_dict(last.post_quant_conv.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
        **SAMPLING,
    )
    shutil.rmtree(out, ignore_errors=True)  # of a shorter training
    quantize(model, QUANTIZATION, folder=out)
    VilaUProcessor.from_pretrained(trained).save_pretrained(out)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(
        __doc__, "outputs/vila-u-emoji", "folder for all stages", minutes=110, data="outputs/emoji.zip"
    )
    parser.add_argument("--start", type=Path, help="folder of a model in 16 bits whose language model is trained on")
    parser.add_argument("--stage", choices=STAGES, help="only this one; default: all in turn")
    args = parser.parse_args(argv)
    art = EmojiArt(args.data)
    wanted = [args.stage] if args.stage else ("model", "evaluate") if args.start else STAGES
    tower, language, decoder = (args.out / name for name in ("tower", "language", "decoder"))
    if "tower" in wanted:
        train_tower(art, tower, TOWER * args.minutes)
    if "model" in wanted:
        fraction = 1.0 if args.start else LANGUAGE_MODEL
        train_model(art, tower / "model", language, fraction * args.minutes, args.start)
    if "decoder" in wanted:
        train_tower(art, decoder, DECODER * args.minutes, decoder_of=tower / "model")
    if "evaluate" in wanted:
        publish(language / "model", args.out / "model", None if args.start else decoder / "model")
        model = VilaUForConditionalGeneration.from_pretrained(args.out / "model", dtype=torch.float32).eval()
        processor = VilaUProcessor.from_pretrained(args.out / "model")
        trained = None if args.start else VilaUVisionModel.from_pretrained(tower / "model")
        print(json.dumps(evaluate(model, processor, args.data, args.out / "evaluation", trained), indent=1))


if __name__ == "__main__":
    main()
