"""Statistics of inputs are those of a hand-made pass, whatever the number of passes."""

import diffusers
import pytest
import torch
from torch import nn

import diffusers_sana
from diffusers_sana.quantizers.svdquant.algorithm.decompose import SAMPLE_ROWS
from diffusers_sana.quantizers.svdquant.calibrate import collect_statistics, split_by_memory, statistics_bytes
from tests.numerics import assert_close_fp32
from tests.quantizers import tiny_models


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.unused = nn.Linear(8, 6), nn.Conv2d(6, 5, 1), nn.Linear(4, 4)

    def forward(self, x):
        return self.conv(self.first(input=x).movedim(-1, 1))

    def layers(self):
        return {"first": self.first, "conv": self.conv}


@pytest.fixture
def small():
    return Small()


@pytest.fixture
def batches():
    return [torch.randn(2, height, 16, 8) * scale for height, scale in ((4, 1), (16, 3), (1, 9))]


def collect(model, batches, observed=("first", "conv"), seed=0):
    def run():
        for batch in batches:
            model(batch)

    return collect_statistics(run, model.layers(), observed, with_hessian={"conv"}, seed=seed)


def test_equal_a_hand_made_pass(small, batches):
    found = collect(small, batches)
    rows = {"first": torch.cat([batch.flatten(0, 2) for batch in batches])}
    rows["conv"] = small.first(rows["first"]).detach()
    for name, expected in rows.items():
        assert_close_fp32(found[name].largest, expected.abs().amax(0))
        assert found[name].inputs.shape == (SAMPLE_ROWS, expected.shape[1])
        # Each row of the sample is one of the rows, no two are the same one, and they keep their order.
        places = torch.cdist(found[name].inputs.double(), expected.double()).min(1)
        assert places.values.max() < 1e-4
        assert (places.indices.diff() > 0).all()
        assert (places.indices < 128).any()
        assert (places.indices > 512).any()
    assert found["first"].hessian is None
    assert_close_fp32(found["conv"].hessian, rows["conv"].t() @ rows["conv"])


def test_every_row_has_the_same_chance(small):
    calls, seeds = 40, 20
    batches = [torch.full((1, 8, 8, 8), float(i)) for i in range(calls)]  # a row tells its call
    counts = torch.zeros(calls)
    for seed in range(seeds):
        inputs = collect(small, batches, ["first"], seed)["first"].inputs
        counts += inputs[:, 0].long().bincount(minlength=calls)
    expected = seeds * SAMPLE_ROWS / calls
    assert counts.sum() == seeds * SAMPLE_ROWS
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_few_rows_are_all_kept(small):
    x = torch.randn(1, 3, 3, 8)
    assert torch.equal(collect(small, [x])["first"].inputs, x.flatten(0, 2))


def test_passes_and_seeds(small, batches):
    together = collect(small, batches)
    for name in ("conv", "first"):
        alone = collect(small, batches, [name])
        assert alone.keys() == {name}
        for key, tensor in alone[name].tensors().items():
            assert torch.equal(tensor, together[name].tensors()[key])
    assert not torch.equal(collect(small, batches, seed=1)["first"].inputs, together["first"].inputs)


def test_dtype_of_the_sample(batches):
    model = Small().to(torch.bfloat16)
    found = collect(model, [batch.bfloat16() for batch in batches])["conv"]
    assert found.inputs.dtype == torch.bfloat16
    assert found.largest.dtype == found.hessian.dtype == torch.float32


def test_inputs_of_our_transformer_are_those_of_diffusers():
    # Which joins layers where nobody looks.
    found = []
    for library in (diffusers_sana, diffusers):
        model, inputs = tiny_models.sana(library)
        torch.manual_seed(1)
        inputs = {key: torch.randn_like(value) for key, value in inputs.items()}
        block = model.transformer_blocks[1]
        layers = {"q": block.attn1.to_q, "inverted": block.ff.conv_inverted, "point": block.ff.conv_point}
        with torch.no_grad():
            model(**inputs)
        found.append(collect_statistics(lambda model=model, inputs=inputs: model(**inputs), layers, layers))
    for name, ours in found[0].items():
        assert_close_fp32(ours.inputs, found[1][name].inputs, 1e-4)
        assert_close_fp32(ours.largest, found[1][name].largest, 1e-4)


def test_bad_runs_leave_no_hooks(small, batches):
    batches[1][0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="inputs of layer 'first' must be finite"):
        collect(small, batches)
    with pytest.raises(ValueError, match="'unused' did not run for these prompts"):
        collect_statistics(lambda: None, {"unused": small.unused}, ["unused"])
    with pytest.raises(ZeroDivisionError):
        collect_statistics(lambda: 1 / 0, small.layers(), ["first"])
    assert not any(layer._forward_pre_hooks for layer in small.modules())


def test_budget(small):
    sizes = {name: statistics_bytes(layer, True) for name, layer in small.layers().items()}
    assert sizes == {"first": 8 * (4 * SAMPLE_ROWS + 4) + 4 * 64, "conv": 6 * (4 * SAMPLE_ROWS + 4) + 4 * 36}
    assert split_by_memory(sizes, 1e9) == [["first", "conv"]]
    assert split_by_memory(sizes, 10) == [["first"], ["conv"]]
    assert split_by_memory({"a": 2, "b": 3, "c": 4, "d": 1}, 5) == [["a", "b"], ["c", "d"]]
    assert split_by_memory({}, 5) == []
