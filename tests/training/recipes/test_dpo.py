"""Diffusion-DPO at tiny size: the formula, preferences that are learned, and pairs; resuming: `test_resume.py`."""

import json
import math

import pytest
import torch

from diffusers_sana.models.transformers.sprint_student import make_student
from diffusers_sana.training.objectives.dpo import preference_losses
from diffusers_sana.training.recipes.dpo import PAIRS_FILE, PairSource, best_and_worst, run, train
from diffusers_sana.training.recipes.options import DpoDataOptions, DpoModelOptions, DpoTrainingConfig
from tests.training.tiny import read_log, tiny_autoencoder, tiny_pipeline, tiny_transformer, write_image_folder


def make_config(folder, **changes):
    settings = {"output_dir": str(folder), "max_steps": 12, "log_every": 1, "flow_shift": 3.0, "sample_steps": 1}
    return DpoTrainingConfig(**settings | {"rank": 8, "learning_rate": 1e-2, "dpo_beta": 500.0} | changes)


def batch():
    """Pairs whose images differ by a constant."""
    embeds = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(5))
    latents = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(6))
    mask = torch.ones(4, 6, dtype=torch.long)
    pairs = {"latents": latents + 1, "rejected_latents": latents - 1}
    return pairs | {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def test_the_formula():
    errors, base = torch.tensor([0.1, 0.3, 0.2, 0.2]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    losses, margins = preference_losses(errors, base, beta=10.0)
    assert margins.tolist() == pytest.approx([0.3, 0.1])  # nearer on the preferred one; further from the rejected one
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-5 * each)) for each in (0.3, 0.1)])
    losses, _ = preference_losses(base, base, beta=10.0)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)


def test_preferences_are_learned_beside_a_base_that_stays(tmp_path):
    torch.manual_seed(0)
    transformer = tiny_transformer()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    train(make_config(tmp_path), [batch()], transformer, tiny_autoencoder())
    rows = read_log(tmp_path)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the adapter begins as nothing
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["loss"] < 0.6
    assert rows[-1]["accuracy"] == 1
    after = {name.replace(".base_layer", ""): value for name, value in transformer.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert list(tmp_path.glob("samples/*.png"))
    transformer.unload_lora()
    transformer.load_lora_adapter(tmp_path / "model", weight_name="pytorch_lora_weights.safetensors")


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="got one of SANA-Sprint"):
        train(make_config(tmp_path), [batch()], make_student(tiny_transformer()))
    with pytest.raises(ValueError, match="`flow_shift` must be a number"):
        train(make_config(tmp_path, flow_shift=None), [batch()], tiny_transformer())
    for changes in ({"dpo_beta": 0.0}, {"sft_weight": -1.0}):
        with pytest.raises(ValueError, match="`dpo_beta` must be above 0 and `sft_weight` at least 0"):
            make_config(tmp_path, **changes)


def test_the_best_and_the_worst_are_a_pair():
    files = [f"{i}.png" for i in range(6)]
    scores = torch.tensor([[0.2, 0.9, 0.1], [0.5, 0.5, 0.5]])
    assert best_and_worst(["a cat", "a dog"], scores, files) == [
        {"prompt": "a cat", "preferred": "1.png", "rejected": "2.png", "scores": pytest.approx([0.9, 0.1])}
    ]


@pytest.fixture
def pairs(tmp_path):
    """Two pairs in a file."""
    write_image_folder(tmp_path / "images", [(32, 40), (40, 32), (32, 32)])
    rows = [("a red cat", 1, 0), ("two dogs", 2, 0)]
    lines = [
        json.dumps({"prompt": prompt, "preferred": f"images/{a}.png", "rejected": f"images/{b}.png"})
        for prompt, a, b in rows
    ]
    (tmp_path / PAIRS_FILE).write_text("\n".join(lines) + "\n")
    return tmp_path / PAIRS_FILE


def test_pairs_of_a_file(pairs, tmp_path):
    source = PairSource(pairs)
    assert source.names == ["images/1.png", "images/0.png", "images/2.png", "images/0.png"]
    assert source.captions == ["a red cat", "a red cat", "two dogs", "two dogs"]
    tiny_pipeline().save_pretrained(tmp_path / "start")
    config = make_config(tmp_path / "out", max_steps=1, flow_shift=None, max_sequence_length=32)
    data = DpoDataOptions(pairs=str(pairs), resolution=32, batch_size=2)
    run(config, data, DpoModelOptions(pretrained=str(tmp_path / "start"), quantize="int4", quantize_rank=2))
    assert config.flow_shift == 3.0
    assert (tmp_path / "out" / "model" / "pytorch_lora_weights.safetensors").is_file()
    assert not (tmp_path / "out" / "pairs").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "`pairs` must be a file of at least one pair"),
        ('{"prompt": "a", "preferred": "x.png"}', "line 1: `rejected` must be a text, got None"),
        ('{"prompt": "", "preferred": "x.png", "rejected": "x.png"}', "line 1: `prompt` must be a text, got ''"),
        ('{"prompt": "a", "preferred": "x.png", "rejected": "x.png"}', "line 1: there is no file '.*x.png'"),
        ('{"prompt": "a", "preferred": "../x.png", "rejected": "x.png"}', "lies outside of the data folder"),
    ],
)
def test_lines_that_are_no_pairs(tmp_path, line, message):
    path = tmp_path / PAIRS_FILE
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        PairSource(path)
