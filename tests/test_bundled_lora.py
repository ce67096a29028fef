"""The bundled LoRA: an ordinary small file that makes pixel art of the bundled checkpoint's images."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open

from diffusers_sana import SanaPipeline, quantize
from diffusers_sana.checkpoints import SANA_EMOJI, SANA_EMOJI_PIXEL_ART
from examples.train_emoji.lora import SUFFIX, is_kept_out, on_grid


WEIGHTS = Path(SANA_EMOJI_PIXEL_ART, "pytorch_lora_weights.safetensors")
PROMPT = f"an apple on a yellow background, flat style{SUFFIX}"


@pytest.fixture(scope="module")
def pipe():
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **kwargs) -> torch.Tensor:
    """An image `[1, 3, H, W]` in [-1, 1]."""
    settings = {"num_inference_steps": 10, "output_type": "pt"} | kwargs
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **settings).images * 2 - 1


def test_folder():
    files = [path for path in Path(SANA_EMOJI_PIXEL_ART).rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"README.md", WEIGHTS.name}
    assert sum(path.stat().st_size for path in files) < 1.5e6
    with safe_open(WEIGHTS, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.r"] == 8


def test_generates_pixel_art_of_an_object_it_was_not_shown(pipe):
    assert is_kept_out("apple")
    base = generate(pipe)
    pipe.load_lora_weights(SANA_EMOJI_PIXEL_ART)
    styled, without = generate(pipe), generate(pipe, attention_kwargs={"scale": 0.0})
    assert torch.equal(without, base)
    assert on_grid(styled) > 1.5 * on_grid(base)
    red, green, blue = styled[0, :, 4:12, 4:12].mean((1, 2))
    assert min(red, green) > blue + 0.5  # the background is still yellow
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), base)


def test_plain_diffusers_generates_the_same(pipe):
    plain = diffusers.SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    size = {"height": 256, "width": 256, "use_resolution_binning": False}
    for each in (pipe, plain):
        each.load_lora_weights(SANA_EMOJI_PIXEL_ART)
    assert (generate(pipe, **size) - generate(plain, **size)).abs().max() < 2e-3
    pipe.unload_lora_weights()


def test_on_the_pipeline_in_4_bits():
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    quantize(pipe, progress=False)
    base = generate(pipe)
    pipe.load_lora_weights(SANA_EMOJI_PIXEL_ART)
    styled = generate(pipe)
    assert on_grid(styled) > 1.5 * on_grid(base)
    assert torch.equal(generate(pipe, attention_kwargs={"scale": 0.0}), base)
