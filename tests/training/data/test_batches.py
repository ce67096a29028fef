"""Buckets, image folders, batches and the latent cache."""

import json
from collections import Counter
from itertools import islice

import pytest
import torch
from PIL import Image

from diffusers_sana.pipelines.resolution import ASPECT_RATIO_BINS
from diffusers_sana.training.data.batches import bucket_batches, bucket_sizes, collate, make_loader, nearest_size
from diffusers_sana.training.data.images import ImageFolder, Images, load_pixels
from diffusers_sana.training.data.latent_cache import fill_cache, model_digest
from tests.training.tiny import tiny_autoencoder, write_image_folder


SIZES = [(32, 64)] * 5 + [(64, 32)] * 3 + [(32, 32)] * 9


def test_bucket_sizes_are_those_of_the_pipelines():
    for resolution, table in ASPECT_RATIO_BINS.items():
        assert bucket_sizes(resolution) == list(dict.fromkeys((int(h), int(w)) for h, w in table.values()))
    assert set(ASPECT_RATIO_BINS) == {512, 1024, 2048, 4096}


def test_bucket_sizes_of_a_small_resolution():
    sizes = bucket_sizes(128)
    assert (128, 128) in sizes
    assert len(set(sizes)) == len(sizes)
    assert all(side % 32 == 0 and side > 0 for size in sizes for side in size)
    with pytest.raises(ValueError, match="`resolution` must be at least 32, got 16"):
        bucket_sizes(16)


def test_bucket_sizes_of_the_authors():
    """The first and some others of their tables at 512 and 1024, and 40 at each resolution."""
    tables = {side: bucket_sizes(side, shapes="authors") for side in (512, 1024, 2048, 4096)}
    assert [len(sizes) for sizes in tables.values()] == [40] * 4
    assert tables[1024][:4] == [(512, 2048), (512, 1984), (512, 1920), (512, 1856)]
    assert {(576, 1728), (832, 1216), (1024, 1024), (1856, 512)} < set(tables[1024])
    assert {(256, 1024), (288, 864), (416, 608), (512, 512)} < set(tables[512])
    assert set(bucket_sizes(1024)) < set(tables[1024])


def test_images_at_several_resolutions(tmp_path):
    """Every image once at each; a batch has one size; the cache has a file for each."""
    write_image_folder(tmp_path / "data", [(40, 40), (40, 80)])
    images = ImageFolder(tmp_path / "data", [(32, 32), (32, 64)])
    several = Images(images.source, [(32, 32), (32, 64)], [(16, 16)])
    assert several.sizes_of_items == [(32, 32), (32, 64), (16, 16), (16, 16)]
    assert several.captions == images.captions * 2
    assert [tuple(several[index]["pixel_values"].shape[1:]) for index in range(4)] == several.sizes_of_items
    assert torch.equal(several[1]["pixel_values"], images[1]["pixel_values"])
    assert several[3]["text"] == images[1]["text"]
    made_from = [json.dumps(several.made_from(index), default=str) for index in range(4)]
    assert len(set(made_from)) == 4
    assert made_from[:2] == [json.dumps(images.made_from(index), default=str) for index in range(2)]
    cached = fill_cache(several, tmp_path / "cache", lambda item: {"latents": item["pixel_values"]}, {})
    assert [tuple(cached[index]["latents"].shape[1:]) for index in range(4)] == several.sizes_of_items


def test_nearest_size_treats_both_orientations_alike():
    sizes = [(512, 512), (256, 1024), (1024, 256)]
    assert nearest_size(100, 100, sizes) == (512, 512)
    assert nearest_size(100, 390, sizes) == (256, 1024)
    assert nearest_size(390, 100, sizes) == (1024, 256)


@pytest.mark.parametrize("num_processes", [1, 3])
def test_bucket_batches_cover_every_item_once_an_epoch(num_processes):
    batches_an_epoch = 2 + 1 + 3  # of 4 out of 5, 3 and 9
    epochs = 3  # a whole number of rounds for 3 processes
    seen = Counter()
    for process in range(num_processes):
        stream = bucket_batches(SIZES, 4, seed=7, process_index=process, num_processes=num_processes)
        for batch in islice(stream, epochs * batches_an_epoch // num_processes):
            assert len({SIZES[index] for index in batch}) == 1
            assert len(batch) <= 4
            seen.update(batch)
    assert seen == dict.fromkeys(range(len(SIZES)), epochs)


def test_bucket_batches_differ_between_epochs_and_seeds():
    first = list(islice(bucket_batches(SIZES, 4, seed=7), 12))
    assert first[:6] != first[6:]
    assert first != list(islice(bucket_batches(SIZES, 4, seed=8), 12))


@pytest.mark.parametrize("start", [0, 1, 6, 11])
def test_bucket_batches_continue_where_they_were(start):
    whole = list(islice(bucket_batches(SIZES, 4, process_index=1, num_processes=2), start + 5))
    rest = islice(bucket_batches(SIZES, 4, start=2 * start, process_index=1, num_processes=2), 5)
    assert list(rest) == whole[start:]


def test_bucket_batches_go_on_with_another_number_of_processes():
    whole = list(islice(bucket_batches(SIZES, 4), 13))
    two = [bucket_batches(SIZES, 4, process_index=rank, num_processes=2) for rank in range(2)]
    three = [bucket_batches(SIZES, 4, start=4, process_index=rank, num_processes=3) for rank in range(3)]
    one = bucket_batches(SIZES, 4, start=10)
    taken = [
        next(process)
        for processes, steps in ((two, 2), (three, 2), ([one], 3))
        for _ in range(steps)
        for process in processes
    ]
    assert taken == whole  # nothing twice, nothing left out


def test_load_pixels_covers_and_cuts_to_the_centre(tmp_path):
    image = Image.new("RGB", (60, 20), "black")
    image.paste("white", (20, 0, 40, 20))  # the middle third
    image.save(tmp_path / "wide.png")
    pixels = load_pixels(tmp_path / "wide.png", 20, 20)
    assert pixels.shape == (3, 20, 20)
    assert (pixels == 1).all()


def test_load_pixels_lays_transparency_over_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_pixels(tmp_path / "clear.png", 16, 8) == 1).all()


def test_image_folder_without_captions_finds_images(tmp_path):
    write_image_folder(tmp_path / "deep", [(20, 20), (20, 40)])
    (tmp_path / "deep" / "metadata.jsonl").unlink()
    folder = ImageFolder(str(tmp_path), [(32, 32), (32, 64)])
    assert [path.name for path in folder.paths] == ["0.png", "1.png"]
    assert folder[1]["pixel_values"].shape == (3, 32, 64)
    assert folder[1]["text"] == ""
    with pytest.raises(ValueError, match="`data` must be a folder with images"):
        ImageFolder(str(tmp_path / "none"), [(32, 32)])


def test_make_loader_resumes_at_the_batch(tmp_path):
    write_image_folder(tmp_path, [(20, 20), (20, 40), (40, 20), (30, 30), (20, 20)])
    load = make_loader(ImageFolder(str(tmp_path), [(32, 32), (32, 64), (64, 32)]), 2, seed=0, num_workers=0)
    whole = list(islice(load(0), 6))
    for batch, again in zip(whole[2:], islice(load(2), 4), strict=True):
        assert batch["text"] == again["text"]
        assert torch.equal(batch["pixel_values"], again["pixel_values"])


def test_collate_pads_text_vectors():
    items = [{"prompt_embeds": torch.ones(length, 3), "text": str(length)} for length in (2, 4)]
    batch = collate(items)
    assert batch["text"] == ["2", "4"]
    assert batch["prompt_embeds"].shape == (2, 4, 3)
    assert batch["prompt_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["prompt_embeds"].sum(dim=(1, 2)).tolist() == [6, 12]


class Items(list):
    """Items that depend on their text alone."""

    def made_from(self, index):
        return self[index]["text"]


class Encoder:
    """Keeps what it was asked to encode."""

    def __init__(self):
        self.asked = []

    def __call__(self, item):
        self.asked.append(item["text"])
        return {"latents": torch.full((4, 2, 3), float(ord(item["text"])))}


def test_fill_cache_encodes_what_is_missing_only(tmp_path):
    items, encode = Items({"text": text} for text in "abc"), Encoder()
    fill_cache(Items(items[:2]), str(tmp_path), encode, {})
    cached = fill_cache(items, str(tmp_path), encode, {})
    assert encode.asked == ["a", "b", "c"]
    assert cached.sizes_of_items == [(2, 3)] * 3
    assert cached[1]["text"] == "b"
    assert cached[1]["latents"].unique().item() == ord("b")


def test_a_cache_is_of_its_items_and_settings(tmp_path):
    """An aborted run, or one with other settings, leaves nothing that is taken for this run's."""
    encode = Encoder()
    for texts, settings in (("ab", {"vae": 1}), ("xb", {"vae": 1}), ("xb", {"vae": 2}), ("bx", {"vae": 1})):
        cached = fill_cache(Items({"text": text} for text in texts), str(tmp_path), encode, settings)
        assert [chr(int(cached[i]["latents"][0, 0, 0])) for i in range(2)] == list(texts)
    assert encode.asked == [*"ab", "x", *"xb"]


def test_changed_images_sizes_and_captions_are_encoded_again(tmp_path):
    write_image_folder(tmp_path, [(20, 20)] * 2)

    def names(sizes=((32, 32),)):
        images = ImageFolder(str(tmp_path), list(sizes))
        return [json.dumps(images.made_from(index)) for index in range(2)]

    first = names()
    assert names() == first
    assert all(a != b for a, b in zip(names(((64, 64),)), first, strict=True))
    Image.new("RGB", (20, 20), "red").save(tmp_path / "0.png")
    assert [a == b for a, b in zip(names(), first, strict=True)] == [False, True]
    (tmp_path / "metadata.jsonl").write_text((tmp_path / "metadata.jsonl").read_text().replace("dogs", "cats"))
    assert [a == b for a, b in zip(names(), first, strict=True)] == [False, False]


def test_models_are_told_apart_by_weights_and_configuration():
    models = [tiny_autoencoder() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    assert model_digest(models[1]) == model_digest(models[0])
    next(models[1].parameters()).data.view(-1)[0] += 1
    models[2].register_to_config(scaling_factor=0.5)
    assert len({model_digest(model) for model in models}) == 3
    assert model_digest(models[0].bfloat16()) != model_digest(models[2])
