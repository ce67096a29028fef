"""VILA-U with quantized weights, by quanto and by this package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import QuantoConfig

from diffusers_sana import SVDQuantConfig
from diffusers_sana.models.vila_u.modeling_vila_u import VilaUForConditionalGeneration
from tests.models.vila_u.tiny import BOS, CELLS, DEPTH, IMAGE_START, IMAGE_TOKENS, random_codes, shared_model


INPUTS = {
    "input_ids": torch.tensor([[BOS, *IMAGE_TOKENS, 8]]),
    "image_codes": random_codes(1),
}


def quantized(folder: Path, config: Any) -> VilaUForConditionalGeneration:
    """The shared model, saved and loaded with `config`, after a look at what it says and writes."""
    shared_model().save_pretrained(folder)
    model = VilaUForConditionalGeneration.from_pretrained(folder, quantization_config=config)
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.depth_transformer.head) is torch.nn.Linear
    with torch.no_grad():
        gold, logits = shared_model()(**INPUTS).logits, model(**INPUTS).logits
    assert 0 < (logits - gold).norm() < 0.25 * gold.norm()
    inputs = {"input_ids": torch.tensor([[BOS, 5, IMAGE_START]]), "negative_input_ids": torch.tensor([[IMAGE_START]])}
    assert model.generate(**inputs, generation_mode="image").shape == (1, CELLS, DEPTH)
    assert model.generate(**INPUTS, max_new_tokens=2, min_new_tokens=2).shape == (1, 2 + len(INPUTS["input_ids"][0]))
    return model


def test_int8_weights_by_quanto(tmp_path):
    pytest.importorskip("optimum.quanto")
    kept = ["model.vision_tower", "model.projector", "lm_head", "depth_transformer.head"]
    model = quantized(tmp_path, QuantoConfig(weights="int8", modules_to_not_convert=kept))
    names = [name for name, module in model.named_modules() if type(module).__name__ == "QLinear"]
    assert len(names) == 2 * 7 + 2 * 6 + 2
    assert all(name.startswith(("model.language_model.layers", "depth_transformer.")) for name in names)


def test_svdquant(tmp_path):
    """The class says which layers; what it chose is saved and read again bit for bit."""
    model = quantized(tmp_path / "16 bit", SVDQuantConfig(rank=16))
    names = [name for name, module in model.named_modules() if hasattr(module, "qweight")]
    assert len(names) == 2 * 7 + 2 * 6
    assert all(name.startswith(("model.language_model.layers", "depth_transformer.layers")) for name in names)
    model.save_pretrained(tmp_path / "4 bit")
    read = VilaUForConditionalGeneration.from_pretrained(tmp_path / "4 bit")
    with torch.no_grad():
        assert read(**INPUTS).logits.equal(model(**INPUTS).logits)
