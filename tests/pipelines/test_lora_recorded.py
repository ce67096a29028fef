"""LoRA files that trainers wrote, against what their own layers computed with them; see `tests/recorded.py`."""

import json

import pytest
import torch
from safetensors.torch import save_file

from diffusers_sana import SanaPipeline, SanaTransformer2DModel
from tests.recorded import Recording, numbers, relative_error, weights


LORA = Recording("lora")


@pytest.fixture(scope="module")
def transformer():
    model = SanaTransformer2DModel(**LORA.about["config"]).eval()
    model.load_state_dict(weights(LORA.shapes["transformer"]))
    return model


def run(transformer):
    latents, text = numbers((2, 4, 4, 5), 3001), numbers((2, 7, 24), 3002) * 3
    with torch.no_grad():
        return transformer(latents, encoder_hidden_states=text, timestep=torch.tensor([500.0, 20.0])).sample


@pytest.mark.parametrize("name", LORA.about["files"])
def test_file(transformer, name, tmp_path):
    entry = LORA.about["files"][name]
    tensors = {key: LORA.outputs[f"tensor/{number}"].clone() for key, number in entry["tensors"].items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if entry["config"]:  # of PEFT
        (tmp_path / "adapter_config.json").write_text(json.dumps(entry["config"]))
    state_dict, metadata = SanaPipeline.lora_state_dict(
        tmp_path, weight_name="adapter_model.safetensors", return_lora_metadata=True
    )
    before = run(transformer)
    assert relative_error(before, LORA.outputs["without"]) < 1e-6
    SanaPipeline.load_lora_into_transformer(state_dict, transformer, "a", metadata=metadata)
    change = LORA.outputs[f"output/{name}"] - LORA.outputs["without"]
    assert relative_error(run(transformer) - before, change) < 1e-4  # of a change that is a hundredth of the output
    transformer.unload_lora()
    assert torch.equal(run(transformer), before)
