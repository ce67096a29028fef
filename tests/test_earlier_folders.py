"""Folders saved by commit c0b358a, before modules moved: they load as then, and give what they gave then, in fp32.

A 4-bit folder is in `quantizers/integrations/test_diffusers.py`.
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

import diffusers_sana
from tests.numerics import relative_error


FOLDERS = Path(__file__).parent / "fixtures" / "earlier"


def test_sana():
    expected = load_file(FOLDERS / "sana" / "outputs.safetensors")
    pipe = DiffusionPipeline.from_pretrained(FOLDERS / "sana", dtype=torch.float32)
    assert type(pipe) is diffusers_sana.SanaPipeline
    assert type(pipe.transformer) is diffusers_sana.SanaTransformer2DModel
    assert type(pipe.vae) is diffusers_sana.AutoencoderDC
    assert type(pipe.scheduler) is diffusers_sana.FlowDPMSolverScheduler
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "generator": generator, "output_type": "latent", "return_dict": False}
    (latents,) = pipe("a red cat", **options)
    assert relative_error(latents, expected["latents"]) < 1e-4
    with torch.no_grad():
        pixels = pipe.vae.decode(latents / pipe.vae.config["scaling_factor"]).sample
    assert relative_error(pixels, expected["pixels"]) < 1e-4


def test_vila_u():
    expected = load_file(FOLDERS / "vila_u" / "outputs.safetensors")
    model = AutoModelForMultimodalLM.from_pretrained(FOLDERS / "vila_u", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(FOLDERS / "vila_u")
    assert type(model) is diffusers_sana.VilaUForConditionalGeneration
    assert type(processor) is diffusers_sana.VilaUProcessor
    inputs = processor(text="a red cat", generation_mode="image")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    codes = model.generate(**inputs, generation_mode="image", do_sample=False)
    assert torch.equal(codes, expected["codes"])
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert relative_error(logits[:, -1], expected["logits"]) < 1e-4
    assert relative_error(model.decode_image_tokens(codes), expected["pixels"]) < 1e-4
