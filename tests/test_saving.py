"""Saved while adapters are beside the layers: refused, with what to do, before anything is written."""

import pytest
import torch
from peft import LoraConfig

import diffusers_sana
from diffusers_sana import SanaPipeline, SVDQuantConfig, quantize
from tests import tiny
from tests.loaders.lora.lora_files import plain, random_lora
from tests.models.controlnets import tiny_controlnet


REFUSED = r"cannot be saved while the adapters \['.+'\] are beside its layers"


def pipeline(bits: int) -> SanaPipeline:
    pipe = SanaPipeline(**tiny.components(diffusers_sana))
    if bits == 4:
        quantize(pipe, SVDQuantConfig(rank=2, refinements=0, smoothing="none"), progress=False)
    return pipe


@pytest.mark.parametrize("bits", [16, 4])
def test_a_pipeline(bits, tmp_path):
    pipe = pipeline(bits)
    pipe.load_lora_weights(plain(random_lora(SanaPipeline(**tiny.components(diffusers_sana)).transformer)))
    folder = tmp_path / "folder"
    for save in (pipe.save_pretrained, pipe.transformer.save_pretrained):
        with pytest.raises(ValueError, match=REFUSED + r".*`pipe\.unload_lora_weights\(\)` before saving; to keep"):
            save(folder)
    assert not folder.exists()
    pipe.unload_lora_weights()
    pipe.save_pretrained(folder)
    weights = SanaPipeline.from_pretrained(folder).transformer.state_dict()
    assert all(weights[name].equal(tensor) for name, tensor in pipe.transformer.state_dict().items())


def test_fused_and_not_unloaded(tmp_path):
    pipe = pipeline(16)
    pipe.load_lora_weights(plain(random_lora(pipe.transformer)))
    pipe.fuse_lora(components=["transformer"])
    with pytest.raises(ValueError, match=REFUSED + r" \(fused into them, but not unloaded\).*keeps what is fused"):
        pipe.save_pretrained(tmp_path)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    saved, fused = (
        model.state_dict() for model in (SanaPipeline.from_pretrained(tmp_path).transformer, pipe.transformer)
    )
    plain_weights = pipeline(16).transformer.state_dict()
    assert all(saved[name].equal(fused[name]) for name in plain_weights)
    assert not all(saved[name].equal(plain_weights[name]) for name in plain_weights)


def test_a_controlnet(tmp_path):
    model = tiny_controlnet()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="edges")
    with pytest.raises(ValueError, match=r"`SanaControlNetModel` cannot be saved while the adapters \['edges'\]"):
        model.save_pretrained(tmp_path / "controlnet")
    assert not (tmp_path / "controlnet").exists()


def test_adapters_of_the_text_encoder(tmp_path):
    pipe = pipeline(16)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="words")
    with pytest.raises(ValueError, match=r"`text_encoder` cannot be saved while the adapters \['words'\]"):
        pipe.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_without_adapters_nothing_is_asked(tmp_path):
    tiny_controlnet().to(torch.bfloat16).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()
