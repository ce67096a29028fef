"""Sampling one of several captions: how probable each is, and which is sampled when."""

from collections import Counter
from itertools import chain, islice

import pytest
import torch

from diffusers_sana.training.data.batches import make_loader
from diffusers_sana.training.data.captions import (
    Caption,
    SampledCaptions,
    best_caption,
    caption_line,
    caption_probabilities,
    embeds_name,
    read_captions,
)
from diffusers_sana.training.data.images import ImageFolder
from tests.training.tiny import write_image_folder


def scored(*scores):
    return [Caption(f"model {i}", f"text {i}", score) for i, score in enumerate(scores)]


def write_captions(folder, *of_images):
    """Images of one size, and their captions."""
    write_image_folder(folder, [(32, 32)] * len(of_images))
    lines = [caption_line(f"{i}.png", captions) for i, captions in enumerate(of_images)]
    (folder / "captions.jsonl").write_text("".join(lines))


def test_power_is_that_of_the_released_code():
    found = caption_probabilities(scored(20.0, 30.0, 27.0), "power", 0.1, threshold=0)
    weights = torch.tensor([20.0, 30.0, 27.0], dtype=torch.float64) ** 10
    assert torch.allclose(found, weights / weights.sum())


def test_softmax_is_that_of_the_paper():
    found = caption_probabilities(scored(20.0, 30.0, 27.0), "softmax", 2.5, threshold=0)
    weights = (torch.tensor([20.0, 30.0, 27.0], dtype=torch.float64) / 2.5).exp()
    assert torch.allclose(found, weights / weights.sum())


@pytest.mark.parametrize("weighting", ["power", "softmax"])
def test_captions_below_the_threshold_are_not_drawn(weighting):
    found = caption_probabilities(scored(24.9, 25.0, 26.0), weighting, 1.0, 25.0)
    assert found[0] == 0
    assert 0 < found[1] < found[2]
    assert caption_probabilities(scored(20.0, 24.0, 3.0), weighting, 1.0, 25.0).tolist() == [0, 1, 0]


def test_extremes_stay_finite():
    assert caption_probabilities(scored(0.0, 0.0)).tolist() == [0.5, 0.5]
    assert caption_probabilities(scored(30.0, 100.0), "softmax", 1e-4).tolist() == [0, 1]
    assert caption_probabilities(scored(30.0, 100.0), "power", 1e-4).tolist() == [0, 1]


def test_without_scores_all_captions_are_equally_probable():
    assert caption_probabilities(scored(None, None)).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"must all have a `clip_score`, or none, got 1 scores of 2.*'text 0'"):
        caption_probabilities(scored(None, 20.0))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="`weighting` must be one of"):
        caption_probabilities(scored(1.0), weighting="linear")
    with pytest.raises(ValueError, match="`temperature` must be above 0, got 0"):
        caption_probabilities(scored(1.0), temperature=0)


def test_lines_of_one_image_count_together(tmp_path):
    path = tmp_path / "captions.jsonl"
    first, last = [Caption("a", "one"), Caption("b", "two")], Caption("a", "one", 3.5)
    lines = [caption_line("1.png", first), caption_line("2.png", []), caption_line("1.png", [last])]
    path.write_text("".join(lines) + lines[0][:20])
    assert read_captions(path) == {"1.png": [last, first[1]]}


def test_the_best_caption_is_that_of_the_highest_score():
    assert best_caption(scored(20.0, 30.0, 27.0)).text == "text 1"
    assert best_caption(scored(None, None)).text == "text 0"


def test_image_folder_reads_several_captions(tmp_path):
    write_captions(tmp_path, scored(20.0, 30.0), scored(5.0))
    folder = ImageFolder(str(tmp_path), [(32, 32)])
    assert folder.captions == ["text 1", "text 0"]  # and not those of metadata.jsonl
    assert folder[0]["texts"] == ["text 0", "text 1"]
    assert [len(captions) for captions in folder.choices] == [2, 1]


def test_draws_follow_the_probabilities(tmp_path):
    write_captions(tmp_path, scored(26.0, 28.0, 10.0))
    folder = ImageFolder(str(tmp_path), [(32, 32)])
    items = SampledCaptions(folder, folder.choices, seed=1)
    fraction = Counter(items.sample(epoch, 0) for epoch in range(2000))[1] / 2000
    expected = 28**10 / (26**10 + 28**10)
    assert fraction == pytest.approx(expected, abs=0.04)
    assert items[0, 0].keys() == {"pixel_values", "text"}
    for epoch in range(5):
        assert items[epoch, 0]["text"] == f"text {items.sample(epoch, 0)}"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_epoch_draws_anew_and_a_resumed_run_draws_the_same(tmp_path, num_workers):
    write_captions(tmp_path, *[scored(None, None, None)] * 5)
    folder = ImageFolder(str(tmp_path), [(32, 32)])
    load = make_loader(SampledCaptions(folder, folder.choices, seed=3), 2, 3, num_workers)
    whole = [batch["text"] for batch in islice(load(0), 9)]  # three epochs of three batches
    epochs = [list(chain(*whole[at : at + 3])) for at in (0, 3, 6)]
    assert all(len(texts) == 5 for texts in epochs)
    assert len({tuple(texts) for texts in epochs}) == 3
    assert [batch["text"] for batch in islice(load(4), 5)] == whole[4:]


def test_draws_do_not_depend_on_the_batch_size(tmp_path):
    captions = [[Caption(m, f"{i} by {m}") for m in "abc"] for i in range(5)]
    write_captions(tmp_path, *captions)
    folder = ImageFolder(str(tmp_path), [(32, 32)])
    items = SampledCaptions(folder, folder.choices, seed=3)
    seen = []
    for batch_size, batches_an_epoch in ((2, 3), (5, 1)):
        loader = make_loader(items, batch_size, 3, 0)(0)
        epochs = (islice(loader_once, batches_an_epoch) for loader_once in [iter(loader)] * 2)
        seen.append([sorted(chain(*(batch["text"] for batch in epoch))) for epoch in epochs])
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[0][1]  # each image is in both, but not with the same captions


def test_the_vectors_of_the_drawn_caption_are_taken_from_a_cache():
    class Cached(list):
        sizes_of_items = [(1, 1)]

    vectors = {embeds_name(i): torch.full((2, 3), float(i)) for i in range(2)}
    items = SampledCaptions(Cached([vectors | {"latents": torch.zeros(1), "text": "?"}]), [scored(None, None)])
    sampled = {items.sample(epoch, 0) for epoch in range(20)}
    assert sampled == {0, 1}
    for epoch in range(20):
        item = items[epoch, 0]
        assert item.keys() == {"latents", "text", "prompt_embeds"}
        assert (item["prompt_embeds"] == items.sample(epoch, 0)).all()
    stale = SampledCaptions(Cached([{"prompt_embeds": torch.zeros(2, 3), "text": "?"}]), [scored(None, None)])
    with pytest.raises(ValueError, match="`cache_dir` holds text vectors of 1 captions of item 0, which has 2"):
        _ = stale[0, 0]
