"""LoRA from two checkpoints: exact where the change has the rank, nearest in the output where it has not."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from diffusers_sana import SanaPipeline, extract_lora
from tests.training.tiny import tiny_pipeline, tiny_transformer


def fine_tuned(base, rank, names=("to_q", "conv_point", "proj_out")):
    """A copy with changes of a rank, at the same seed."""
    tuned, generator = deepcopy(base), torch.Generator().manual_seed(1)
    for name, module in tuned.named_modules():
        if name.endswith(names):
            weight = module.weight.data
            up, down = (
                torch.randn(len(weight), rank, generator=generator),
                torch.randn(rank, weight[0].numel(), generator=generator),
            )
            weight += 0.1 * (up @ down).view_as(weight)
    return tuned


@torch.no_grad()
def predict(transformer):
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 16, generator=generator)
    return transformer.eval()(latents, text, torch.tensor([500.0, 100.0])).sample


def test_a_change_of_the_rank_is_found_exactly_and_loads(tmp_path):
    pipe = tiny_pipeline()
    base = pipe.transformer.eval()
    tuned = fine_tuned(base, rank=2)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    found = extract_lora(base, tuned, rank=2)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert {name.split(".")[-3] for name in found.state_dict} == {"to_q", "conv_point", "proj_out"}
    assert max(found.errors.values()) < 1e-5
    assert found.left_out == []
    plain, wanted = predict(base), predict(tuned)
    SanaPipeline.save_lora_weights(tmp_path, transformer_lora_layers=found.state_dict)
    pipe.load_lora_weights(tmp_path)
    assert not torch.allclose(plain, wanted, atol=1e-2)
    assert torch.allclose(predict(pipe.transformer), wanted, atol=1e-4)


def test_statistics_of_the_inputs_make_the_output_nearer():
    """A layer whose inputs are mostly a few directions keeps what those see."""
    generator = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 24))
    tuned = deepcopy(base)
    tuned[0].weight.data += torch.randn(24, 32, generator=generator)
    inputs = torch.randn(256, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    inputs += 0.05 * torch.randn(256, 32, generator=generator)

    def output_error(found):
        product = found.state_dict["0.lora_B.weight"] @ found.state_dict["0.lora_A.weight"]
        change = tuned[0].weight - base[0].weight
        return ((inputs @ (change - product).T).norm() / (inputs @ change.T).norm()).item()

    plain, weighted = extract_lora(base, tuned, rank=4), extract_lora(base, tuned, rank=4, run=lambda: base(inputs))
    assert output_error(weighted) < 0.05 < 0.3 < output_error(plain)
    assert weighted.errors["0"] == pytest.approx(output_error(weighted), rel=1e-2)
    in_parts = extract_lora(base, tuned, rank=4, run=lambda: base(inputs), memory_bytes=1)
    assert all(torch.equal(value, weighted.state_dict[name]) for name, value in in_parts.state_dict.items())


def test_the_error_is_that_of_the_best_approximation():
    base, tuned = nn.Sequential(nn.Linear(20, 12)), nn.Sequential(nn.Linear(20, 12))
    tuned[0].bias.data.copy_(base[0].bias.data)
    values = torch.linalg.svdvals((tuned[0].weight - base[0].weight).detach())
    found = extract_lora(base, tuned, rank=5)
    assert found.errors["0"] == pytest.approx((values[5:].norm() / values.norm()).item(), rel=1e-3)
    assert found.state_dict["0.lora_A.weight"].shape == (5, 20)
    whole = extract_lora(base, tuned, rank=16)  # more than the layer has
    assert whole.state_dict["0.lora_B.weight"].shape == (12, 16)
    assert whole.errors["0"] < 1e-5


def test_what_a_lora_cannot_hold_is_named(caplog):
    base = tiny_transformer()
    tuned = fine_tuned(base, rank=1, names=("to_q", "conv_depth"))
    tuned.proj_out.bias.data += 1
    found = extract_lora(base, tuned, rank=1)
    assert {"proj_out.bias", "transformer_blocks.0.ff.conv_depth.weight"} <= set(found.left_out)
    assert "cannot hold the changes" in caplog.text
    with pytest.raises(ValueError, match="`tuned` must differ from `base`"):
        extract_lora(base, deepcopy(base))
    with pytest.raises(ValueError, match="`tuned` must be of the architecture of `base`"):
        extract_lora(base, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        extract_lora(base, tuned, rank=0)
