"""Post-training by rewards at tiny size: rewards rise, roll-outs in 4 bits, and errors; resuming: `test_resume.py`."""

import math

import pytest
import torch
from safetensors.torch import load_file

from diffusers_sana import SVDQuantConfig, quantize
from diffusers_sana.models.transformers.sprint_student import make_student
from diffusers_sana.training.recipes import nft
from diffusers_sana.training.recipes.nft import read_prompts, train
from diffusers_sana.training.recipes.options import NftDataOptions, NftModelOptions, NftTrainingConfig
from diffusers_sana.training.recipes.text_to_image import Encoders
from tests.training.tiny import read_log, redness, tiny_autoencoder, tiny_transformer


def make_config(folder, **changes):
    settings = {"output_dir": str(folder), "max_steps": 2, "log_every": 1, "flow_shift": 3.0, "sample_steps": 2}
    sizes = {"group_size": 8, "rollout_steps": 4, "levels_per_image": 2, "chunk_size": 16, "rank": 8, "lora_alpha": 8}
    return NftTrainingConfig(**settings | sizes | {"learning_rate": 1e-2} | changes)


def batch(**changes):
    embeds = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 6, dtype=torch.long)
    return {"text": ["a cat", "two dogs"], "prompt_embeds": embeds, "prompt_attention_mask": mask} | changes


def parts():
    torch.manual_seed(0)
    return tiny_transformer(), Encoders(vae=tiny_autoencoder())


def test_the_reward_rises_beside_a_base_that_stays(tmp_path):
    transformer, encoders = parts()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    train(make_config(tmp_path, max_steps=12), [batch()], transformer, encoders, redness, resolution=16)
    rows = read_log(tmp_path)
    rewards = [row["reward"] for row in rows]
    spread = rows[0]["reward_std"]
    assert sum(rewards[-4:]) / 4 > rewards[0] + spread
    assert rows[0]["kl"] == 0 < rows[-1]["kl"]  # the adapter begins as nothing
    after = {name.replace(".base_layer", ""): value for name, value in transformer.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert list(tmp_path.glob("samples/*.png"))
    transformer.unload_lora()
    transformer.load_lora_adapter(tmp_path / "model", weight_name="pytorch_lora_weights.safetensors")


def test_4_bit_roll_outs_are_generated_again_in_16_bits_where_they_differ_most(tmp_path):
    transformer, encoders = parts()
    rollout = tiny_transformer()
    rollout.load_state_dict(transformer.state_dict())
    quantize(rollout, SVDQuantConfig(rank=2), progress=False)
    seen = []

    def reward(images, prompts):
        scores = redness(images, prompts)
        seen.append((images, prompts, scores))
        return scores

    config = make_config(tmp_path, kept_per_group=4, old_decay_rate=0.5, rollout_guidance=2.0)
    train(config, [batch()], transformer, encoders, reward, 16, rollout)
    assert [len(prompts) for _, prompts, _ in seen] == [16, 8, 16, 8]
    explored, prompts, scores = seen[0]
    assert prompts == ["a cat"] * 8 + ["two dogs"] * 8
    order = scores[:8].argsort()
    chosen = sorted([*order[:2].tolist(), *order[-2:].tolist()])
    again = seen[1][0][:4]
    assert 0 < (again - explored[chosen]).abs().mean() < 0.05  # of the same noise, without the error of 4 bits
    # The sampling policy is an EMA of the trained one, and what the 4-bit copy has.
    [folder] = (tmp_path / "checkpoints").glob("step_*2")
    old = load_file(folder / "tensors.safetensors")
    trained = load_file(folder / "model.safetensors")
    assert old.keys() == {name.removeprefix("transformer.") for name in trained}
    assert any(not torch.equal(old[name], trained[f"transformer.{name}"]) for name in old)


@pytest.mark.parametrize(
    ("reward", "changes", "kind", "message"),
    [
        ("red", {}, TypeError, "`reward` must be a function"),
        (lambda images, prompts: images, {}, ValueError, r"one score per image, shape \(16,\)"),
        (lambda images, prompts: [math.nan] * 16, {}, ValueError, "finite scores, got nan for the prompt 'a cat'"),
        (redness, {"flow_shift": None}, ValueError, "`flow_shift` must be a number"),
        (redness, {"resolution": 18}, ValueError, "`resolution` must be a multiple of 4, got 18"),
        (redness, {"vae": None}, ValueError, "`encoders` must have a `vae`"),
        (redness, {"text": None}, ValueError, "`batches` must hold `text`"),
    ],
)
def test_errors(tmp_path, reward, changes, kind, message):
    transformer, encoders = parts()
    resolution = changes.pop("resolution", 16)
    given = batch()
    if "text" in changes:
        del given["text"], changes["text"]
    if "vae" in changes:
        encoders = Encoders(**changes)
        changes = {}
    with pytest.raises(kind, match=message):
        train(make_config(tmp_path, **changes), [given], transformer, encoders, reward, resolution)


def test_errors_of_models_and_options(tmp_path):
    transformer, encoders = parts()
    with pytest.raises(ValueError, match="got one of SANA-Sprint"):
        train(make_config(tmp_path), [batch()], make_student(transformer), encoders, redness, 16)
    for changes, message in (
        ({"nft_beta": 0.0}, "`nft_beta` must be above 0"),
        ({"old_decay_max": 1.0}, r"`old_decay_max` must be in \[0, 1\)"),
        ({"loss_weighting": "cosmap"}, "`loss_weighting` must be 'none'"),
        ({"advantage_std": "world"}, "`advantage_std` must be one of"),
        ({"rank": 0}, "`rank` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(tmp_path, **changes)
    with pytest.raises(ValueError, match="`reward_weights` must be 1 numbers"):
        NftModelOptions(pretrained="owner/name", reward=("clip",), reward_weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="`rollout_quantize` must be 'no'"):
        NftModelOptions(pretrained="owner/name", quantize="int4", rollout_quantize="int4")
    with pytest.raises(ValueError, match="there is no file"):
        NftDataOptions(prompts=str(tmp_path / "none.txt"))


def test_prompts_are_lines_or_checks(tmp_path):
    lines, checks = tmp_path / "prompts.txt", tmp_path / "checks.jsonl"
    lines.write_text("a cat\n\n two dogs \n")
    assert read_prompts(lines) == (["a cat", "two dogs"], [])
    checks.write_text('{"tag": "single_object", "prompt": "a cat", "include": [{"class": "cat"}]}\n')
    prompts, found = read_prompts(checks)
    assert (prompts, found[0].include[0].label) == (["a cat"], "cat")
    lines.write_text("\n")
    with pytest.raises(ValueError, match="at least one prompt"):
        read_prompts(lines)


def test_the_policies_change_places_only_inside():
    model = torch.nn.Linear(2, 2)
    policy = dict(model.named_parameters())
    own = {name: value.detach().clone() for name, value in policy.items()}
    with nft.values_of(policy, {name: value + 1 for name, value in own.items()}):
        assert torch.equal(policy["bias"], own["bias"] + 1)
    assert torch.equal(policy["bias"], own["bias"])
