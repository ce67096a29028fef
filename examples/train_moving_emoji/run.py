"""Trains a tiny SANA-Video on emoji that move, over the bundled autoencoder and text encoder, and judges it.

    python -m examples.train_moving_emoji.run --data outputs/emoji-256.zip --minutes 40

The clips and captions are encoded once. Under OUT/run are log, samples and checkpoints; stop at any time, the same
command goes on. At the end OUT/model is the pipeline in bf16, `held_out.webp` shows videos of held-out prompts, and
`evaluation.json` says how many of them move as asked, by the rule of `rule.py`. `--minutes 0` only judges again.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import environment
from diffusers_sana import (
    FlowDPMSolverScheduler,
    SanaPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.pipelines.video_decoding import compression, decode_videos, encode_videos
from diffusers_sana.training.data.batches import collate
from diffusers_sana.training.recipes.options import SanaVideoTrainingConfig
from diffusers_sana.training.recipes.sana_video import SanaVideoInputs, train
from diffusers_sana.training.recipes.text_to_image import Encoders
from examples.train_emoji.common import device, make_settings, write_report
from examples.train_emoji.scenes import Art

from .motions import FPS, FRAMES, RESOLUTION, Clip, all_clips, held_out_clips, render, taught_clips
from .rule import motion_of


BATCH_SIZE = 32
FLOW_SHIFT = 2.0  # 128 tokens need less noise than the thousands of a released model
GUIDANCE, STEPS = 2.5, 20
SETTINGS: dict[str, Any] = {
    "optimizer": "muon",
    "learning_rate": 2e-3,
    "warmup_steps": 50,
    "max_grad_norm": 1.0,
    "ema_decay": 0.995,
    "flow_shift": FLOW_SHIFT,
    "sample_guidance": GUIDANCE,
    "keep_checkpoints": 1,
    "sample_minutes": 10.0,
    "save_minutes": 3.0,
}


def make_transformer(parts: dict[str, Any]) -> SanaVideoTransformer3DModel:
    """A SANA-Video of 6 blocks and width 96, 1.1 M parameters, for the latents and text vectors of a pipeline."""
    channels = parts["vae"].config.latent_channels
    return SanaVideoTransformer3DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=6,
        num_cross_attention_heads=4,
        cross_attention_head_dim=24,
        cross_attention_dim=96,
        caption_channels=parts["text_encoder"].config.hidden_size,
        sample_size=RESOLUTION // compression(parts["vae"])[1],
        patch_size=(1, 1, 1),
        rope_max_seq_len=64,
    )


@torch.no_grad()
def encode_clips(vae: Any, art: Art, clips: list[Clip], batch_size: int = 8) -> Tensor:
    """Latents `[B, C, T, h, w]`, each frame encoded alone."""
    batches = (clips[start : start + batch_size] for start in range(0, len(clips), batch_size))
    return torch.cat([encode_videos(vae, render(art, batch)) for batch in batches])


def make_batches(clips: list[Clip], latents: Tensor, vectors: dict[str, Tensor]) -> Any:
    """Endless batches of clips with one of their captions, as a function of the number of those already used."""

    def from_number(used: int) -> Iterator[dict[str, Any]]:
        while True:
            rng = random.Random(used)
            rows = rng.choices(range(len(clips)), k=BATCH_SIZE)
            texts = [rng.choice(clips[row].captions) for row in rows]
            yield {"latents": latents[rows], **collate([{"prompt_embeds": vectors[text]} for text in texts])}
            used += 1

    return from_number


def train_for(minutes: float, art: Art, parts: dict[str, Any], out: Path, **changes: Any) -> Path:
    """Trains for `minutes` in all; returns the folder of the transformer. `changes` are of the settings."""
    clips, run = taught_clips(), out / "run"
    config = SanaVideoTrainingConfig(**make_settings(run, minutes, **SETTINGS | changes))
    encoders = Encoders(**{name: parts[name] for name in ("vae", "text_encoder", "tokenizer")})
    inputs = SanaVideoInputs(config, torch.device(device()), encoders)
    texts = sorted({text for clip in all_clips() for text in clip.captions})
    vectors = {text: inputs.encode_prompt(text).cpu() for text in texts}
    samples = collate([{"prompt_embeds": vectors[clip.prompt]} for clip in held_out_clips()[:8]])
    batches = make_batches(clips, encode_clips(parts["vae"], art, clips), vectors)
    torch.manual_seed(config.seed)
    train(config, batches, make_transformer(parts), Encoders(vae=parts["vae"]), samples)
    return run / "model" / "transformer"


def save_video_pipeline(image_model: str, trained: Path, out: Path) -> None:
    """Writes a pipeline in bf16: the transformer in the folder `trained`, and the other parts of an image pipeline."""
    changed = {
        "transformer": SanaVideoTransformer3DModel.from_pretrained(trained, dtype=torch.bfloat16),
        "scheduler": FlowDPMSolverScheduler(flow_shift=FLOW_SHIFT),
    }
    parts = SanaPipeline.from_pretrained(image_model, dtype=torch.bfloat16).components
    SanaVideoPipeline(**parts | changed).save_pretrained(out)


def generate(pipe: SanaVideoPipeline, prompts: list[str], batch_size: int = 10, **settings: Any) -> Tensor:
    """Videos `[B, 3, F, H, W]` in [-1, 1]; the seed of a prompt is its number."""
    size = {"height": RESOLUTION, "width": RESOLUTION, "frames": FRAMES, "output_type": "pt"}
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE} | settings
    made = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(start + number) for number in range(len(part))]
        made.append(pipe(part, generator=generators, **size, **settings).frames.float().cpu())  # type: ignore[union-attr]
    return torch.cat(made).transpose(1, 2) * 2 - 1


def accuracy(videos: Tensor, clips: list[Clip]) -> dict[str, Any]:
    """How many of the videos show the motion of their clip, and which show another."""
    shown = [motion_of(video) for video in videos]
    wrong = [
        {"prompt": clip.prompt, "shown": seen} for clip, seen in zip(clips, shown, strict=True) if seen != clip.motion
    ]
    return {"right": len(clips) - len(wrong), "videos": len(clips), "wrong": wrong}


@torch.no_grad()
def judge(art: Art, pipe: SanaVideoPipeline, out: Path, **settings: Any) -> dict[str, Any]:
    """Judges held-out prompts, and the rule itself on true renders; writes the figures and some of the videos."""
    clips, every = held_out_clips(), all_clips()
    videos = generate(pipe, [clip.prompt for clip in clips], **settings)
    again = torch.cat(
        [decode_videos(pipe.vae, each[None], compression(pipe.vae)[1]) for each in encode_clips(pipe.vae, art, every)]
    )
    report = environment() | {
        "generated": accuracy(videos, clips),
        "true renders": accuracy(render(art, every), every),
        "true renders, encoded and decoded": accuracy(again, every),
        "parameters": sum(parameter.numel() for parameter in pipe.transformer.parameters()),
    }
    save_sheet(videos[:24], out / "held_out.webp")
    return write_report(report, out)


def save_sheet(videos: Tensor, path: Path, columns: int = 8) -> None:
    """An animation (.webp or .gif) of videos `[B, 3, F, H, W]` in [-1, 1] side by side."""
    rows = -(-len(videos) // columns)
    blank = torch.ones(rows * columns - len(videos), *videos.shape[1:])
    cells = torch.cat([videos.cpu(), blank]).unflatten(0, (rows, columns))  # [rows, columns, 3, F, H, W]
    sheets = cells.permute(3, 0, 4, 1, 5, 2).flatten(3, 4).flatten(1, 2)  # [F, rows * H, columns * W, 3]
    pixels = ((sheets.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    frames = [Image.fromarray(sheet) for sheet in pixels]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0, quality=80)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/emoji-256.zip"), help="what prepare_data wrote")
    parser.add_argument("--out", type=Path, default=Path("outputs/moving-emoji"), help="folder of run and result")
    parser.add_argument("--model", default=SANA_EMOJI, help="pipeline of images whose parts are used")
    parser.add_argument("--minutes", type=float, default=40, help="time budget of the training in all; 0 only judges")
    args = parser.parse_args(argv)
    art = Art(args.data)
    folder = args.out / "model"
    if args.minutes:
        parts = SanaPipeline.from_pretrained(args.model, dtype=torch.float32).to(device()).components
        save_video_pipeline(args.model, train_for(args.minutes, art, parts, args.out), folder)
    pipe = SanaVideoPipeline.from_pretrained(folder, dtype=torch.float32).to(device())
    pipe.set_progress_bar_config(disable=True)
    report = judge(art, pipe, args.out)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
