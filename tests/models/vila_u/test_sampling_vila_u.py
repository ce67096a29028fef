"""How codes are sampled: filters on adversarial logits, frequencies, separate noise for each sample, guidance."""

import pytest
import torch

from diffusers_sana.models.vila_u.sampling_vila_u import CodeNoise, VisualSampling, guide
from tests.models.vila_u.tiny import CODES, DEPTH


SPIKE = torch.full((1, 50), -5.0).index_fill_(1, torch.tensor([17]), 30.0)
LOGITS = {
    "spike": SPIKE,
    "ties": torch.zeros(1, 50),
    "two levels": torch.tensor([[1.0] * 5 + [0.0] * 45]),
    "random": torch.randn(3, 50, generator=torch.Generator().manual_seed(0)),
    "huge": 1e4 * torch.randn(3, 50, generator=torch.Generator().manual_seed(1)),
    "minus infinity": torch.randn(2, 50, generator=torch.Generator().manual_seed(2)).masked_fill(
        torch.arange(50) % 7 > 0, -torch.inf
    ),
}


@pytest.mark.parametrize("options", [(1.0, 0, 1.0), (1.0, 9, 1.0), (0.7, 0, 0.9), (2.0, 20, 0.5), (1.0, 900, 0.96)])
@pytest.mark.parametrize("name", LOGITS)
def test_candidates(name, options):
    """As a set of rules on one sorted row; which of equals are kept is not said."""
    logits, (temperature, top_k, top_p) = LOGITS[name], options
    probabilities, codes = VisualSampling(True, *options).candidates(logits)
    for row, of_row, their_codes in zip(logits, probabilities, codes, strict=True):
        best = sorted(row.double().tolist(), reverse=True)[: top_k or 50]
        reference = torch.tensor(best, dtype=torch.float64).div(temperature).softmax(0)
        total, kept = 0.0, []
        for value in reference.tolist():
            kept.append(value if total < top_p - 1e-9 else 0.0)
            total += value
        torch.testing.assert_close(of_row.double(), torch.tensor(kept, dtype=torch.float64), atol=1e-6, rtol=1e-5)
        assert of_row[0] > 0
        assert their_codes.unique().numel() == len(their_codes)
        torch.testing.assert_close(row[their_codes].double(), torch.tensor(best, dtype=torch.float64))


def test_draws_follow_the_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0]).expand(40_000, 5)
    sampling = VisualSampling(top_k=4, top_p=1.0)
    noise = CodeNoise(torch.Generator().manual_seed(0), (40_000, 1, 1, 5), torch.device("cpu")).sample()
    sampled = sampling.choose(logits, noise[:, 0, 0]).bincount(minlength=5) / 40_000
    reference = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf]).softmax(0)
    torch.testing.assert_close(sampled, reference, atol=0.01, rtol=0)
    assert sampled[4] == 0


def test_noise_of_each_sample_is_its_own():
    shape, cpu = (3, 2, DEPTH, CODES), torch.device("cpu")
    many = CodeNoise([torch.Generator().manual_seed(seed) for seed in (5, 6, 7)], shape, cpu)
    alone = CodeNoise([torch.Generator().manual_seed(6)], (1, *shape[1:]), cpu)
    for _ in range(2):
        assert torch.equal(many.sample()[1:2], alone.sample())


def test_guidance_formula():
    logits, scales = torch.randn(4, 9), torch.tensor([[3.0], [1.0]])
    conditional, unconditional = logits.chunk(2)
    torch.testing.assert_close(guide(logits, scales), unconditional + scales * (conditional - unconditional))
    assert torch.equal(guide(logits, scales)[1], conditional[1])  # a scale of 1 changes no bit
    assert guide(logits, None) is logits
