"""Training of the codebook against a literal reference, alone and on two ranks."""

import threading

import pytest
import torch
import torch.distributed as dist

from tests.models.vila_u.test_quantizer_vila_u import CHANNELS, quantizer
from tests.models.vila_u.tiny import CODES
from tests.numerics import assert_close_fp32


class LiteralEma:
    """The moving averages of the module's docstring, with dense counts; `draw` gives the restarts.

    In float64, but for the counts: an entry restarted (1) and then used once stays at 1, the limit, up to rounding.
    Restarts also make entries of equal value, so a code only has to be as near as the nearest.
    """

    def __init__(self, table, count, decay, restart):
        self.table = table.double()
        self.sums, self.counts = self.table * (count or 1), torch.full((len(table),), float(count))
        self.decay, self.restart = decay, restart

    def step(self, features, codes, draw):
        residual = features.double()
        for code in codes.unbind(1):
            distances = torch.cdist(residual, self.table, compute_mode="donot_use_mm_for_euclid_dist").square()
            assert (distances.gather(1, code[:, None])[:, 0] <= distances.amin(dim=1) + 1e-4).all()
            chosen = torch.nn.functional.one_hot(code, len(self.table)).double()
            found = self.table[code]
            self.counts = (self.decay * self.counts).add(chosen.sum(dim=0).float(), alpha=1 - self.decay)
            self.sums = self.decay * self.sums + (1 - self.decay) * chosen.T @ residual
            if self.restart:
                fresh = draw(residual)
                for k in range(len(self.table)):
                    if self.counts[k] < 1:
                        self.sums[k], self.counts[k] = fresh[k], 1
            counts, total = self.counts.double(), self.counts.double().sum()
            smoothed = total * (counts + 1e-5) / (total + len(counts) * 1e-5)
            self.table = self.sums / smoothed[:, None]
            residual = residual - found


def draw_restarts(residual):
    """What the module documents: a permutation, then, with fewer vectors than entries, noise."""
    repeats = -(-CODES // len(residual))
    picked = residual[torch.randperm(len(residual) * repeats)[:CODES] % len(residual)]
    if repeats > 1:
        picked = picked + torch.rand(CODES, CHANNELS) * (0.01 / CHANNELS**0.5)
    return picked


@pytest.mark.parametrize("number", [40, 150], ids=["fewer-vectors-than-entries", "more"])
@pytest.mark.parametrize(("restart", "count"), [(True, 0), (True, 1.5), (False, 2)], ids=str)
def test_ema_equals_the_reference(number, restart, count):
    module = quantizer(training=True, restart_unused_codes=restart, codebook_decay=0.9)
    module.start_ema(count)
    reference = LiteralEma(module.embedding.weight.detach(), count, 0.9, restart)
    for step in range(4):
        features = torch.randn(number, CHANNELS)
        torch.manual_seed(step)
        out = module(features)
        torch.manual_seed(step)
        reference.step(features, out.codes, draw_restarts)
        assert_close_fp32(module.cluster_size_ema, reference.counts)
        assert_close_fp32(module.embed_ema, reference.sums)
        assert_close_fp32(module.embedding.weight.detach(), reference.table)


def test_same_seed_same_codebook():
    tables = []
    for _ in range(2):
        torch.manual_seed(3)
        module = quantizer(training=True)
        module.start_ema()
        for _ in range(3):
            module(torch.randn(50, CHANNELS))
        tables.append(module.embedding.weight.detach().clone())
    assert torch.equal(*tables)


def test_restarts_fill_the_codebook_from_the_batch():
    module, features = quantizer(training=True, num_codebooks=1), torch.randn(CODES, CHANNELS)
    module.start_ema()
    module(features)
    assert torch.equal(module.cluster_size_ema, torch.ones(CODES))
    order = module.embedding.weight @ features.T
    assert sorted(order.argmax(dim=1).tolist()) == list(range(CODES))  # each vector once
    assert module(features).commitment_loss < 1e-6


def test_trained_codebook_survives_a_start():
    module, features = quantizer(training=True), torch.randn(40, CHANNELS)
    before = module.embedding.weight.detach().clone()
    module.start_ema(100)
    module(features)
    assert (module.embedding.weight - before).norm() < 0.1 * before.norm()


def test_only_training_after_start_changes_the_codebook():
    module, features = quantizer(training=True), torch.randn(40, CHANNELS)
    before = module.embedding.weight.detach().clone()
    module(features)
    module.start_ema()
    module.encode(features)
    module.eval()(features)
    assert torch.equal(module.embedding.weight, before)
    module.train()(features)
    assert not torch.equal(module.embedding.weight, before)
    after = module.embedding.weight.detach().clone()
    module.stop_ema()
    module(features)
    assert torch.equal(module.embedding.weight, after)
    assert list(module.state_dict()) == ["embedding.weight"]


def test_state_dict_resumes_training():
    module, batches = quantizer(training=True), torch.randn(2, 80, CHANNELS)
    module.start_ema()
    module(batches[0])
    resumed = quantizer(training=True)
    resumed.start_ema()
    resumed.load_state_dict(module.state_dict())
    for each in (module, resumed):
        torch.manual_seed(1)
        each(batches[1])
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_errors():
    module = quantizer(training=True)
    with pytest.raises(ValueError, match="`initial_count` must not be negative, got -1"):
        module.start_ema(-1)
    with pytest.raises(ValueError, match="`initial_count` must be positive, got 0"):
        quantizer(restart_unused_codes=False).start_ema()
    module.start_ema()
    module.bfloat16()
    with pytest.raises(RuntimeError, match=r"must be float32, but the model has been cast to torch\.bfloat16"):
        module(torch.randn(4, CHANNELS).bfloat16())


@pytest.fixture
def two_ranks(monkeypatch):
    """Runs a function on two threads that `torch.distributed` takes for two ranks; returns both results."""
    barrier, shared, rank = threading.Barrier(2, timeout=30), {}, threading.local()

    def exchange(tensor):
        shared[rank.value] = tensor.clone()
        barrier.wait()
        gathered = shared[0], shared[1]
        barrier.wait()
        return gathered

    monkeypatch.setattr(dist, "is_initialized", lambda: hasattr(rank, "value"))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.copy_(sum(exchange(tensor))))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.copy_(exchange(tensor)[src]))

    def run(function):
        results = [None, None]

        def work(index):
            rank.value = index
            results[index] = function(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


@pytest.mark.parametrize("restart", [True, False], ids=["restart", "no-restart"])
def test_two_ranks_are_one_batch(two_ranks, restart):
    """Ranks stay equal. Without restarts, whose vectors are rank 0's, they do what one process does with all data."""
    single = quantizer(training=True, restart_unused_codes=restart)
    batches, state = torch.randn(3, 2, 70, CHANNELS), single.state_dict()

    def train(rank):
        module = quantizer(training=True, restart_unused_codes=restart)
        module.load_state_dict(state)
        module.start_ema(2)
        for batch in batches:
            module(batch[rank])
        return module.state_dict()

    first, second = two_ranks(train)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    if not restart:
        single.start_ema(2)
        for batch in batches:
            single(batch.flatten(0, 1))
        for name, tensor in single.state_dict().items():
            assert_close_fp32(tensor, first[name])


def test_restarts_come_from_rank_0(two_ranks):
    features = torch.stack([torch.randn(CODES, CHANNELS), 100 + torch.randn(CODES, CHANNELS)])

    def train(rank):
        module = quantizer(training=True, num_codebooks=1)
        module.start_ema()
        module.embed_ema.zero_()
        module(features[rank])
        return module.embedding.weight.detach()

    for table in two_ranks(train):
        mean = table.mean(dim=1)
        assert (mean.abs() < 5).sum() >= CODES - 3  # entries that the far rank did use may lie there
