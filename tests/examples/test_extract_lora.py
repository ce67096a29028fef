"""The script that extracts a LoRA, with and without prompts."""

import pytest
import torch

from diffusers_sana import SanaPipeline
from examples.extract_lora import main
from tests.training.tiny import tiny_pipeline


@torch.no_grad()
def predict(transformer):
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 16, generator=generator)
    return transformer.eval()(latents, text, torch.tensor([500.0, 100.0])).sample


@pytest.mark.parametrize("prompts", ["", "a red cat\ntwo dogs\n"])
def test_the_lora_makes_the_base_the_tuned_model(prompts, tmp_path, capsys):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    layer = pipe.transformer.transformer_blocks[1].attn2.to_k
    layer.weight.data += torch.randn(len(layer.weight), 1) @ torch.randn(1, layer.weight.shape[1])
    pipe.save_pretrained(tmp_path / "tuned")
    arguments = ["--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "tuned"), "--rank", "2", "--steps", "1"]
    arguments += ["--output-dir", str(tmp_path / "lora"), "--device", "cpu"]
    if prompts:
        (tmp_path / "prompts.txt").write_text(prompts)
        arguments += ["--prompts", str(tmp_path / "prompts.txt")]
    main(arguments)
    assert "1 layers; the LoRA lacks 0.0% of the change" in capsys.readouterr().out
    base = SanaPipeline.from_pretrained(tmp_path / "base")
    before = predict(base.transformer)
    base.load_lora_weights(tmp_path / "lora")
    wanted = predict(pipe.transformer)
    assert not torch.allclose(before, wanted, atol=1e-3)
    assert torch.allclose(predict(base.transformer), wanted, atol=1e-4)
