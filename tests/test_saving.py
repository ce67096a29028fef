"""Saved while adapters are beside the layers: refused, with what to do, before anything is written."""

import pytest
import torch
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

import diffusers_sana
from diffusers_sana import SanaPipeline, SVDQuantConfig, VilaUPipeline, quantize
from tests import tiny
from tests.loaders.lora.lora_files import plain, random_lora
from tests.models.controlnets import tiny_controlnet
from tests.models.vila_u.tiny import tiny_model
from tests.models.vila_u.tiny_processor import tiny_processor


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
    message = r"`text_encoder` cannot be saved while the adapters \['words'\].*`pipe.unload_lora_weights\(\)` .*"
    with pytest.raises(ValueError, match=message + r"call `pipe.fuse_lora\(components=\['text_encoder'\]\)` before"):
        pipe.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "folder")


def add_adapters(model: torch.nn.Module) -> None:
    """As PEFT does by itself: transformers knows nothing of them."""
    inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]), model)


class TestVilaU:
    def test_pipeline_and_model(self, tmp_path):
        pipe = VilaUPipeline(tiny_model(), tiny_processor())
        add_adapters(pipe.model)
        for save, name in ((pipe.save_pretrained, "model"), (pipe.model.save_pretrained, type(pipe.model).__name__)):
            with pytest.raises(
                ValueError, match=rf"`{name}` .*\['default'\].*Call `diffusers\.utils\.recurse_remove_peft_layers"
            ):
                save(tmp_path / "folder")
        assert not (tmp_path / "folder").exists()
        for layer in pipe.model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
        with pytest.raises(ValueError, match="fused into them, but not unloaded"):
            pipe.save_pretrained(tmp_path / "folder")
        recurse_remove_peft_layers(pipe.model)
        pipe.save_pretrained(tmp_path / "folder")
        weights = VilaUPipeline.from_pretrained(tmp_path / "folder").model.state_dict()
        assert all(weights[name].equal(tensor) for name, tensor in pipe.model.state_dict().items())
        name = "model.language_model.layers.0.self_attn.q_proj.weight"
        assert not weights[name].equal(tiny_model().state_dict()[name])

    def test_model_with_adapters_of_transformers_saves_those_alone(self, tmp_path):
        pipe = VilaUPipeline(tiny_model(), tiny_processor())
        pipe.model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="words")
        pipe.model.save_pretrained(tmp_path / "adapters")
        assert (tmp_path / "adapters/adapter_model.safetensors").is_file()
        with pytest.raises(ValueError, match=r"`model` cannot be saved while the adapters \['words'\]"):
            pipe.save_pretrained(tmp_path / "folder")


def test_a_text_encoder_of_4_bits(tmp_path):
    """Of transformers: the folder is refused where it would have names that nothing loads."""
    model = tiny.text_encoder()
    quantize(model, SVDQuantConfig(rank=2, refinements=0), progress=False)
    add_adapters(model)
    with pytest.raises(ValueError, match=r"`Gemma2Model` cannot be saved while the adapters \['default'\]"):
        model.save_pretrained(tmp_path / "folder")
    recurse_remove_peft_layers(model)
    model.save_pretrained(tmp_path / "folder")
    weights = type(model).from_pretrained(tmp_path / "folder").state_dict()
    assert all(weights[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_an_autoencoder(tmp_path):
    vae = tiny.vae(diffusers_sana)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), vae)
    with pytest.raises(ValueError, match=r"`AutoencoderDC` cannot be saved while the adapters \['default'\]"):
        vae.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_without_adapters_nothing_is_asked(tmp_path):
    tiny_controlnet().to(torch.bfloat16).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()
