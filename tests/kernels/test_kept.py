"""What is kept of a weight ends with its memory, and is made again after the weight was written into."""

import torch

from diffusers_sana.kernels.kept import Kept, kept_changes


def weight():
    return torch.nn.Parameter(torch.arange(4.0), requires_grad=False), torch.ones(1)


def scaled(codes, scales):
    return codes * scales


def test_a_value_ends_when_offloading_takes_the_memory():
    """Group offloading of diffusers gives the same parameter other memory, and tells nobody."""
    kept, (codes, scales) = Kept(), weight()
    offloaded = codes.data.clone()
    assert kept.get(scaled, codes, scales) is kept.get(scaled, codes, scales)
    before, view = kept_changes(), codes.data[1:]
    codes.data = offloaded
    assert codes in kept  # the memory is still used
    del view
    assert codes not in kept
    assert kept_changes() == before + 1
    kept.get(scaled, codes, scales)
    assert len(kept) == 1


def test_a_write_into_the_weight_is_seen_before_the_next_product():
    """A CUDA graph that has recorded the address of a value does not ask for it again."""
    kept, (codes, scales) = Kept(), weight()
    for tensor in (codes, scales):
        kept.get(scaled, codes, scales)
        before = kept_changes()
        assert kept_changes() == before
        tensor.mul_(2)
        assert kept_changes() == before + 1
        assert codes not in kept
    assert torch.equal(kept.get(scaled, codes, scales), torch.tensor([0.0, 4.0, 8.0, 12.0]))


def test_a_replaced_scale_counts_as_a_change():
    kept, (codes, scales) = Kept(), weight()
    kept.get(scaled, codes, scales)
    before = kept_changes()
    del scales
    assert kept_changes() == before + 1


def test_values_do_not_keep_their_weights_alive():
    kept, (codes, scales) = Kept(), weight()
    kept.get(scaled, codes, scales)
    del codes
    assert len(kept) == 0
