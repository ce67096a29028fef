"""What only a GPU can show: every dtype agrees with fp32 on the CPU, and the same seed gives the same bits."""

import pytest
import torch
from peft import LoraConfig

from diffusers_sana import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.kernels.dispatch import kernel_mode
from tests.numerics import relative_error


pytestmark = pytest.mark.gpu

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_transformer_and_autoencoder(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    # By default cuDNN computes fp32 convolutions in TF32, whose rounding is larger than what is asked for here.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    transformer = SanaTransformer2DModel.from_pretrained(SANA_EMOJI, subfolder="transformer").eval()
    vae = AutoencoderDC.from_pretrained(SANA_EMOJI, subfolder="vae").eval()
    latents, text = torch.randn(2, 32, 4, 4), torch.randn(2, 7, transformer.config.caption_channels)
    with torch.no_grad():
        velocity = transformer(latents, text, torch.tensor([500.0, 500.0])).sample
        image = vae.decode(latents).sample
        transformer.to("cuda", dtype)
        vae.to("cuda", dtype)
        on_gpu = transformer(latents.to("cuda", dtype), text.to("cuda", dtype), torch.full((2,), 500.0, device="cuda"))
        image_on_gpu = vae.decode(latents.to("cuda", dtype)).sample
    assert relative_error(on_gpu.sample.float().cpu(), velocity) < TOLERANCES[dtype]
    assert relative_error(image_on_gpu.float().cpu(), image) < TOLERANCES[dtype]


def test_same_seed_same_bits():
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.bfloat16).to("cuda")
    images = [
        pipe("an apple", generator=torch.Generator("cpu").manual_seed(0), output_type="pt").images for _ in range(2)
    ]
    assert torch.equal(*images)


def test_model_cpu_offload():
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    pipe("an apple", num_inference_steps=2)
    assert pipe.transformer.device.type == "cpu"


def test_cuda_graphs_give_the_same_image():
    """Over prompts of several lengths, with and without guidance, at several sizes, after an adapter."""
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.bfloat16).to("cuda")

    def images() -> list[torch.Tensor]:
        settings = [("a fox", 4.5, 128), ("an apple on a blue background", 4.5, 128), ("a fox", 1.0, 96)]
        return [
            pipe(
                prompt,
                guidance_scale=guidance,
                height=size,
                width=size,
                use_resolution_binning=False,
                num_inference_steps=4,
                generator=torch.Generator("cpu").manual_seed(0),
                output_type="pt",
            ).images
            for prompt, guidance, size in settings
        ]

    expected = images()
    pipe.enable_cuda_graphs()
    for _ in range(2):
        for actual, eager in zip(images(), expected, strict=True):
            assert torch.equal(actual, eager)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    changed = images()
    pipe.disable_cuda_graphs()
    for actual, eager in zip(changed, images(), strict=True):
        assert torch.equal(actual, eager)
    assert not torch.equal(changed[0], expected[0])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@torch.no_grad()
def test_kernels_against_references_in_whole_models(dtype: torch.dtype):
    transformer = SanaTransformer2DModel.from_pretrained(SANA_EMOJI, subfolder="transformer").eval().to("cuda", dtype)
    vae = AutoencoderDC.from_pretrained(SANA_EMOJI, subfolder="vae").eval().to("cuda", dtype)
    latents = torch.randn(2, 32, 8, 8, device="cuda", dtype=dtype)
    text = torch.randn(2, 7, transformer.config.caption_channels, device="cuda", dtype=dtype)
    times = torch.full((2,), 500.0, device="cuda")
    results = {}
    for mode in ("triton", "torch"):
        with kernel_mode(mode):
            results[mode] = transformer(latents, text, times).sample, vae.decode(latents).sample
    for kernel, reference in zip(results["triton"], results["torch"], strict=True):
        assert relative_error(kernel, reference) < TOLERANCES[dtype]
