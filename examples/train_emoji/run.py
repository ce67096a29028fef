"""Trains the bundled checkpoint from nothing, unattended, within a time budget.

    python -m examples.train_emoji.run --data outputs/emoji.zip --out outputs/sana-emoji --minutes 25

Three stages, each resumed where it stopped when the command is given again: the autoencoder; the transformer together
with its text encoder; the autoencoder's decoder once more, alone, on latents that no longer move. Then the pipeline is
put together in bf16 under `OUT/pipeline` and judged on held-out prompts under `OUT/evaluation`.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_sana import AutoencoderDC, SanaPipeline
from diffusers_sana.prompts.encoding import complex_human_instruction
from diffusers_sana.training.recipes import dc_ae, sana
from diffusers_sana.training.recipes.options import DCAETrainingConfig, SanaTrainingConfig
from diffusers_sana.training.recipes.text_to_image import Encoders

from .common import assemble, device, make_parser, make_settings
from .data import COMMON_OBJECTS, EmojiArt, EmojiScenes, LatentScenes
from .evaluate import evaluate, held_out_scenes
from .models import FLOW_SHIFT, RESOLUTION, make_autoencoder, make_text_encoder, make_transformer
from .tokenizer import make_tokenizer, texts


@dataclass(frozen=True)
class Preset:
    """What depends on the machine; learning rates belong to the batch sizes.

    Attributes:
        store, renewed: see `LatentScenes`.
        all_objects: whether Sana is taught every object or the common ones.
        compile_autoencoder, compile_sana: on a CPU only the transformer's many small operations gain by it.
    """

    mixed_precision: str
    autoencoder_batch: int
    autoencoder_rate: float
    sana_batch: int
    sana_rate: float
    store: int
    renewed: int
    all_objects: bool
    compile_autoencoder: bool
    compile_sana: bool


PRESETS = {
    "cpu": Preset("bf16", 16, 8e-4, 64, 1.5e-3, 2048, 8, False, False, True),
    "cuda": Preset("bf16", 128, 1e-3, 512, 2e-3, 16384, 256, True, True, True),
}
# Fractions of the time budget.
AUTOENCODER, SANA, DECODER = 0.4, 0.45, 0.15


def taught(preset: Preset, art: EmojiArt) -> Sequence[str]:
    """The objects that Sana learns."""
    return art.labels if preset.all_objects else COMMON_OBJECTS


def train_autoencoder(
    preset: Preset, art: EmojiArt, out: Path, minutes: float, decoder_of: Path | None = None
) -> Path:
    """Trains a new autoencoder, or only the decoder of `decoder_of`; returns the folder of the model."""
    scenes = EmojiScenes(art, RESOLUTION, device(), seed=2 if decoder_of else 1)
    settings = make_settings(
        out,
        minutes,
        trained_prefixes=("decoder.",) if decoder_of else None,
        learning_rate=preset.autoencoder_rate,
        warmup_steps=100,
        mixed_precision=preset.mixed_precision,
        ema_decay=0.999,
        compile=preset.compile_autoencoder,
        perceptual_weight=0.1,
        perceptual_crop=64,
        perceptual_every=2,
    )
    model = AutoencoderDC.from_pretrained(decoder_of) if decoder_of else make_autoencoder()
    dc_ae.train(DCAETrainingConfig(**settings), scenes.autoencoder_batches(preset.autoencoder_batch), model)
    return out / "model"


def train_transformer(preset: Preset, art: EmojiArt, vae_folder: Path, out: Path, minutes: float) -> Path:
    """Trains the transformer and its text encoder; returns the folder of the pipeline."""
    tokenizer = make_tokenizer(texts(art), complex_human_instruction())
    vae = AutoencoderDC.from_pretrained(vae_folder).to(device())
    scenes = EmojiScenes(art, RESOLUTION, device(), seed=3, labels=taught(preset, art))
    latents = LatentScenes(scenes, vae, preset.store, preset.renewed)
    settings = make_settings(
        out,
        minutes,
        learning_rate=preset.sana_rate,
        warmup_steps=200,
        max_grad_norm=1.0,
        mixed_precision=preset.mixed_precision,
        ema_decay=0.999,
        flow_shift=FLOW_SHIFT,
        train_text_encoder=True,
        compile=preset.compile_sana,
        sample_prompts=tuple(scene.prompt for scene in held_out_scenes(scenes.labels)[:16]),
    )
    config = SanaTrainingConfig(**settings)
    transformer = make_transformer()
    encoders = Encoders(vae=vae, text_encoder=make_text_encoder(tokenizer), tokenizer=tokenizer)
    # On a CPU the fused attention's backward pass is the slowest operation of the step, at 16 tokens per image.
    with nullcontext() if device() == "cuda" else sdpa_kernel(SDPBackend.MATH):
        sana.train(config, latents.batches(preset.sana_batch), transformer, encoders)
    return out / "model"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "outputs/sana-emoji", "folder for all stages", minutes=25)
    parser.add_argument(
        "--stage", choices=("autoencoder", "sana", "decoder", "evaluate"), help="only this one; default: all in turn"
    )
    args = parser.parse_args(argv)
    preset = PRESETS[device()]
    art = EmojiArt(args.data)
    wanted = [args.stage] if args.stage else ["autoencoder", "sana", "decoder", "evaluate"]
    if "autoencoder" in wanted:
        train_autoencoder(preset, art, args.out / "autoencoder", AUTOENCODER * args.minutes)
    encoder = args.out / "autoencoder" / "model"
    if "sana" in wanted:
        train_transformer(preset, art, encoder, args.out / "sana", SANA * args.minutes)
    if "decoder" in wanted:
        train_autoencoder(preset, art, args.out / "decoder", DECODER * args.minutes, decoder_of=encoder)
    if "evaluate" in wanted:
        assemble(args.out / "sana" / "model", args.out / "decoder" / "model", args.out / "pipeline")
        pipe = SanaPipeline.from_pretrained(args.out / "pipeline")
        print(json.dumps(evaluate(pipe, args.data, taught(preset, art), args.out / "evaluation"), indent=1))


if __name__ == "__main__":
    main()
