"""Generation that goes on where it stopped, and measures over files."""

import pytest
import torch
from PIL import Image

from diffusers_sana.evaluation import measure
from diffusers_sana.evaluation.checks import Check, Wanted
from diffusers_sana.evaluation.config import images_in
from diffusers_sana.evaluation.images import generate_missing, to_images, to_tensor
from diffusers_sana.evaluation.observations import Detection, Observation
from diffusers_sana.evaluation.significance import interval_of_share
from diffusers_sana.evaluation.similarity import psnr


PROMPTS, SEEDS = [f"p{i}" for i in range(5)], [3, 4, 5, 6, 7]


class Artist:
    """Generates one color per seed; stops after some batches."""

    def __init__(self, stop_after: int = 100):
        self.calls, self.stop_after = [], stop_after

    def __call__(self, prompts, seeds):
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(list(prompts))
        return [Image.new("RGB", (4, 4), (10 * seed, len(prompts), 0)) for seed in seeds]


def test_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate_missing(Artist(stop_after=1), PROMPTS, SEEDS, tmp_path, {"model": "m"}, batch_size=2)
    assert [path.name for path in images_in(tmp_path)] == ["00000.png", "00001.png"]
    artist = Artist()
    paths = generate_missing(artist, PROMPTS, SEEDS, tmp_path, {"model": "m"}, batch_size=2)
    assert artist.calls == [["p2", "p3"], ["p4"]]
    assert [Image.open(path).getpixel((0, 0))[0] for path in paths] == [30, 40, 50, 60, 70]
    again = Artist()
    assert generate_missing(again, PROMPTS, SEEDS, tmp_path, {"model": "m"}, batch_size=2) == paths
    assert again.calls == []


def test_a_missing_image_is_generated_in_its_old_batch(tmp_path):
    """What a model generates may depend on the batch, by rounding."""
    paths = generate_missing(Artist(), PROMPTS, SEEDS, tmp_path, {}, batch_size=2)
    before = paths[1].read_bytes()
    paths[1].unlink()
    artist = Artist()
    generate_missing(artist, PROMPTS, SEEDS, tmp_path, {}, batch_size=2)
    assert artist.calls == [["p0", "p1"]]
    assert paths[1].read_bytes() == before


def test_half_an_image_is_none(tmp_path):
    """A process that is killed while it writes leaves no file that counts as done."""

    class Unlucky(Image.Image):
        def save(self, path, **options):
            path.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_missing(lambda prompts, seeds: [Unlucky()] * len(seeds), PROMPTS, SEEDS, tmp_path, {})
    assert not list(tmp_path.glob("*.png"))


def test_images_of_other_settings(tmp_path):
    generate_missing(Artist(), PROMPTS, SEEDS, tmp_path / "a", {"model": "m"})
    with pytest.raises(ValueError, match="images, model differ; choose another folder"):
        generate_missing(Artist(), PROMPTS[:3], SEEDS[:3], tmp_path / "a", {"model": "other"})
    Image.new("RGB", (4, 4)).save(tmp_path / "holiday.png")
    with pytest.raises(ValueError, match=r"has holiday\.png"):
        generate_missing(Artist(), PROMPTS, SEEDS, tmp_path, {})


def test_tensors_and_images():
    pixels = torch.arange(48).view(1, 3, 4, 4).float() / 255
    assert torch.equal(to_tensor(to_images(pixels)), pixels)
    with pytest.raises(ValueError, match="one size"):
        to_tensor([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))])


def test_folders(tmp_path):
    with pytest.raises(OSError, match="there is no folder"):
        images_in(tmp_path / "none")
    with pytest.raises(OSError, match="has none"):
        images_in(tmp_path)


@pytest.fixture
def paths(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(files):
        Image.new("RGB", (4 if i < 3 else 6, 4), (40 * i, 0, 0)).save(path)
    return files


def test_batches_have_one_size(paths):
    assert [tuple(batch.shape) for batch in measure.batches(paths, 2)] == [(2, 3, 4, 4), (1, 3, 4, 4), (2, 3, 4, 6)]


def test_checked_scenes(paths):
    """Image i is red to 40 i; the observer says fox from 80 on, and knows which check is asked."""
    tags = ["easy", "easy", "easy", "hard", "hard"]
    checks = [Check(tag, f"p{i}", i, (Wanted("fox"),), style=str(i % 2)) for i, tag in enumerate(tags)]

    def observe(images, asked):
        assert len(images) == len(asked)
        labels = ["fox" if image[0, 0, 0] > 0.3 else "cat" for image in images]
        return [Observation((Detection(label, 1.0, (0, 0, 1, 1)),), style="1") for label in labels]

    report = measure.check_scenes(paths, checks, observe)

    def share(right, of):
        return {"share": right / of, "of": of, "interval": list(interval_of_share(right, of))}

    assert report["by_property"] == {"object": share(3, 5), "style": share(2, 5)}
    assert report["correct"] == share(1, 5)
    assert report["by_tag"] == {"easy": share(0, 3), "hard": share(1, 2)}
    assert report["verdicts"][3] == {"prompt": "p3", "seed": 3, "object": True, "style": True}


def test_clip_scores_keep_to_their_texts(paths):
    texts = ["0", "40", "80", "120", "160"]

    def scores(images, lines):
        return (images[:, 0, 0, 0] * 255 - torch.tensor([float(line) for line in lines])).abs()

    figures = measure.mean_of("clip_score", measure.score_images(paths, texts, scores))
    assert figures["clip_score"] == pytest.approx(0, abs=1e-3)
    assert figures["clip_score_interval"] == pytest.approx([0, 0], abs=1e-3)


def test_pairs(paths):
    same = measure.compare_pairs(paths[:2], paths[:2], {"psnr_db": psnr})
    assert same == {"psnr_db": None, "psnr_db_interval": None, "pairs": 2, "equal_pairs": 2}
    mixed = measure.compare_pairs([paths[0], paths[0]], [paths[0], paths[1]], {"psnr_db": psnr})
    assert mixed["equal_pairs"] == 1
    assert mixed["psnr_db"] == pytest.approx(float(-10 * torch.tensor((40 / 255) ** 2 / 3).log10()), abs=1e-3)


def test_sets(paths):
    features = measure.collect_features(paths, lambda images: images[:, :, 0, 0])
    assert features.shape == (5, 3)
    report = measure.compare_sets(features, features, ("fid", "kid"))
    assert report["fid"] == pytest.approx(0, abs=1e-9)
    assert measure.compare_sets(features, features + 1, ("fid",))["fid"] == pytest.approx(3)
    assert {"kid", "kid_deviation", "kid_interval", "images", "others"} <= report.keys()


def test_an_image_whose_writing_is_cut_off_is_generated_again(tmp_path):
    class Torn:
        def save(self, path, **options):
            path.write_bytes(b"half of an image")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_missing(lambda prompts, seeds: [Torn()] * len(prompts), PROMPTS, SEEDS, tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    (tmp_path / ".0a1b2c.png").write_bytes(b"what a kill leaves")
    paths = generate_missing(Artist(), PROMPTS, SEEDS, tmp_path, {})
    assert images_in(tmp_path) == paths
    assert [Image.open(path).format for path in paths] == ["PNG"] * len(paths)
