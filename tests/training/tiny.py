"""Tiny parts of a Sana pipeline and tiny data, built on the spot."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Gemma2Model, GemmaTokenizer

from diffusers_sana import AutoencoderDC, FlowDPMSolverScheduler, SanaPipeline, SanaTransformer2DModel
from diffusers_sana.prompts.encoding import complex_human_instruction
from diffusers_sana.training.recipes.text_to_image import Encoders
from tests import tiny


CAPTIONS = ["a red cat", "two dogs on a blue hill", "", "A green house "]


@cache
def tiny_tokenizer() -> GemmaTokenizer:
    """Byte-pair encoding as Gemma's: words carry the space before them, BOS in front, no EOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    texts = [complex_human_instruction(), *(f" {caption.lower().strip()}" for caption in CAPTIONS * 4)]
    special_tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return GemmaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True, padding_side="left")


def tiny_text_encoder(**changes: Any) -> Gemma2Model:
    """Two layers of width 16, one of them with a sliding window."""
    settings = {"vocab_size": 320, "num_hidden_layers": 2, "query_pre_attn_scalar": 8, "initializer_range": 0.3}
    return Gemma2Model(tiny.text_config(**settings | changes)).eval()


def encoders(text_encoder: Any, vae: Any) -> Encoders:
    """Those of a recipe, with the tiny tokenizer."""
    return Encoders(vae=vae, text_encoder=text_encoder, tokenizer=tiny_tokenizer())


def tiny_transformer() -> SanaTransformer2DModel:
    """Two blocks of width 16."""
    return SanaTransformer2DModel(**tiny.TRANSFORMER | {"sample_size": 32})


def tiny_autoencoder(has_attention: bool = False) -> AutoencoderDC:
    """Four times compression, four latent channels; the deepest stage with or without attention."""
    block_types = ("ResBlock", "ResBlock", "EfficientViTBlock" if has_attention else "ResBlock")
    return AutoencoderDC(
        attention_head_dim=4,
        encoder_block_types=block_types,
        decoder_block_types=block_types,
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        encoder_qkv_multiscales=((),) * 3,
        decoder_qkv_multiscales=((),) * 3,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
    )


def tiny_pipeline() -> SanaPipeline:
    """All tiny parts together."""
    parts = (tiny_tokenizer(), tiny_text_encoder(), tiny_autoencoder(), tiny_transformer())
    return SanaPipeline(*parts, FlowDPMSolverScheduler(flow_shift=3.0))


def smooth_images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Random color gradients `[count, 3, size, size]` in [-1, 1], which even a tiny autoencoder can learn."""
    coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=True)


def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A reward: how much redder than green or blue images `[B, 3, H, W]` are."""
    assert len(images) == len(prompts)
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def image_batches(start: int) -> Iterator[dict[str, Any]]:
    """Endless batches of four images with captions, the same whenever begun at the same number."""
    while True:
        yield {"pixel_values": smooth_images(4, 32, seed=start), "text": CAPTIONS}
        start += 1


def write_image_folder(folder: Path, sizes: list[tuple[int, int]]) -> None:
    """Images of the given (height, width), with captions in `metadata.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (height, width) in enumerate(sizes):
        pixels = np.full((height, width, 3), 40 * index % 256, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": CAPTIONS[index % len(CAPTIONS)]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def latent_batch() -> dict[str, Any]:
    """Four latents and text vectors, as a cache holds them."""
    embeds, mask = torch.randn(4, 6, 16), torch.ones(4, 6, dtype=torch.long)
    return {"latents": torch.randn(4, 4, 4, 4), "prompt_embeds": embeds, "prompt_attention_mask": mask}


def interrupted(batches: Callable[[int], Iterator], at: int | None) -> Callable[[int], Iterator]:
    """The same batches, with a SIGTERM to this process before the one of number `at`."""

    def from_number(start: int) -> Iterator:
        for number, batch in enumerate(batches(start), start):
            if number == at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return from_number


def short_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run of three steps that logs each."""
    return {"output_dir": str(folder), "max_steps": 3, "log_every": 1, **changes}


def check_resuming(run: Callable[..., dict[str, torch.Tensor]], folder: Path) -> dict[str, torch.Tensor]:
    """Checks that a run killed in its second step and resumed gives the weights of an uninterrupted one; returns them.

    `run(folder, resume=False, stop_at=None)` trains, and returns the weights.
    """
    whole = run(folder / "whole")
    run(folder / "parts", stop_at=1)
    assert len(read_log(folder / "parts")) == 2
    resumed = run(folder / "parts", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    return whole


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
