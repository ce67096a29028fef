"""Cards of trained folders."""

import json

import pytest
import torch
from huggingface_hub import ModelCard

import diffusers_sana
from diffusers_sana.training.model_card import write_model_card
from tests import tiny


def code_of(card: ModelCard) -> str:
    """The first block of code, which comes before any other text."""
    title, block, *_ = card.text.split("```")
    assert title.strip().startswith("# ")
    code = block.removeprefix("python\n")
    compile(code, "card", "exec")
    return code


def test_pipeline(tmp_path):
    folder = tiny.write_official_folder(tmp_path / "sana-cats")
    facts = {"trained on": "7 images"}
    write_model_card(folder, base_model="someone/Sana", license="apache-2.0", tags=("cats",), facts=facts)
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data == {
        "base_model": "someone/Sana",
        "base_model_relation": "finetune",
        "library_name": "diffusers",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers_sana", "sana", "cats"],
    }
    assert code_of(card) == (
        'from diffusers_sana import SanaPipeline\n\npipe = SanaPipeline.from_pretrained("sana-cats")\n'
    )
    count = sum(p.numel() for p in tiny.transformer().parameters()) / 1e6
    assert f"| transformer | {count:.3g} million parameters |" in card.text
    assert "| trained on | 7 images |" in card.text
    # tests/pipelines/test_folders.py runs these lines in a process without this package.
    assert 'Plain diffusers loads it too: `diffusers.SanaPipeline.from_pretrained("sana-cats")`.' in card.text
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"sample_size": 4}))
    assert "`use_resolution_binning=False`" in write_model_card(folder, base_model="someone/Sana").text


def test_model(tmp_path):
    tiny.vae(diffusers_sana).save_pretrained(tmp_path)
    card = write_model_card(tmp_path, "me/cats-vae")
    assert code_of(card).splitlines()[-1] == 'model = AutoencoderDC.from_pretrained("me/cats-vae")'
    assert "base" not in card.content
    assert "Plain diffusers" not in card.content
    assert "licen" not in card.content
    assert card.data.pipeline_tag is None


def test_class_that_is_not_ours(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert code_of(write_model_card(tmp_path)).startswith("from diffusers import FluxPipeline")


def test_lora(tmp_path):
    weights = {"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 16)}
    diffusers_sana.SanaPipeline.save_lora_weights(tmp_path, weights)
    with pytest.raises(ValueError, match="`base_model` must be given for a LoRA"):
        write_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
    card = write_model_card(tmp_path, "me/ink", base_model="someone/Sana")
    assert code_of(card).splitlines()[2:] == [
        'pipe = SanaPipeline.from_pretrained("someone/Sana")',
        'pipe.load_lora_weights("me/ink")',
    ]
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "lora" in card.data.tags


def test_nothing_there(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(ValueError, match="`folder` must hold what"):
        write_model_card(tmp_path)
