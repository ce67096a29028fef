"""Images and captions in every layout that people have: folders, metadata, tars, datasets of the Hub."""

import io
import json
import sys
import tarfile
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from diffusers_sana.training.config import ImageDataOptions
from diffusers_sana.training.data.batches import make_loader
from diffusers_sana.training.data.captions import read_captions
from diffusers_sana.training.data.images import ImageFolder, load_images
from diffusers_sana.training.data.sources import FolderSource, HubSource, TarSource, image_digest
from diffusers_sana.training.recipes.lora import captioned_folder


SIZES = [(32, 64), (64, 32)]


def plain_image(level=0, size=(8, 6)):
    return Image.new("RGB", size, (level, 0, 0))


def write_images(folder, *names):
    for level, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plain_image(level).save(path)


def as_bytes(image, suffix="png"):
    data = io.BytesIO()
    image.save(data, suffix)
    return data.getvalue()


def captions_of(folder, **options):
    source = FolderSource(folder, **options)
    return dict(zip(source.names, source.captions, strict=True))


class TestMetadata:
    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
    @pytest.mark.parametrize("column", ["text", "caption", "prompt"])
    def test_formats_and_columns(self, tmp_path, kind, column):
        write_images(tmp_path, "a.png", "sub/b.png", "unlisted.png")
        rows = [{"file_name": "a.png", column: 'a "fox", red'}, {"file_name": "sub/b.png", column: "für\u2028dich"}]
        path = tmp_path / f"metadata.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8-sig")
        elif kind == "csv":
            path.write_text(f'file_name,{column}\na.png,"a ""fox"", red"\nsub/b.png,für\u2028dich\n', "utf-8-sig")
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        options = {"caption_column": column} if column == "prompt" else {}
        assert captions_of(tmp_path, **options) == {row["file_name"]: row[column] for row in rows}

    def test_as_datasets_reads_it(self, tmp_path):
        """With files of metadata in subfolders, to which their names are relative."""
        write_images(tmp_path, "train/x/0.png", "train/x/1.png", "train/y/0.png", "test/x/0.png")
        for folder, names in {"train/x": ["1.png", "0.png"], "train/y": ["0.png"], "test/x": ["0.png"]}.items():
            lines = [json.dumps({"file_name": name, "text": f"{folder}/{name}"}) for name in names]
            (tmp_path / folder / "metadata.jsonl").write_text("\n".join(lines))
        for split in ("train", "test"):
            theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split=split)
            ours = ImageFolder(tmp_path, [(6, 8)], split=split)
            assert sorted(ours.captions) == sorted(theirs["text"])
            by_text = {row["text"]: np.asarray(row["image"]) for row in theirs}
            for index, caption in enumerate(ours.captions):
                pixels = (ours[index]["pixel_values"].permute(1, 2, 0) + 1) * 127.5
                assert np.array_equal(pixels.round().numpy(), by_text[caption])

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"file_name": "a.png"}', "line 2: a row must have a caption"),
            ('{"file_name": "a.png", "text": null}', "line 2: a row must have a caption"),
            ('{"file_name": "a.png", "text": 5}', "line 2: `text` must be a string, got 5"),
            ('{"file_name": "a.png", "text": ["a"]}', "line 2: `text` must be a string"),
            ('{"file_name": "a.png", "text": "x", "caption": "y"}', "line 2: there are `text` and `caption`"),
            ('{"text": "x"}', "line 2: `file_name` must name an image, got None"),
            ('{"file_name": "none.png", "text": "x"}', "line 2: there is no file"),
            ('["a.png", "x"]', "line 2: a line must be an object"),
            ('{"file_name": ', "line 2: not valid JSON"),
            ("a.png,a fox, red", "line 2: it must have 2 fields. Quote"),
            ("a.png", "line 2: it must have 2 fields"),
            ("none.png,x", "line 2: there is no file"),
        ],
    )
    def test_bad_lines_are_named(self, tmp_path, line, message):
        is_json = line[0] in "{["
        name, first = ("jsonl", '{"file_name": "a.png", "text": "good"}') if is_json else ("csv", "file_name,text")
        write_images(tmp_path, "a.png")
        (tmp_path / f"metadata.{name}").write_text(f"{first}\n{line}\n")
        with pytest.raises(ValueError, match=rf"metadata\.{name}', {message}"):
            ImageFolder(tmp_path, SIZES)

    def test_bad_parquet(self, tmp_path):
        write_images(tmp_path, "a.png")
        (tmp_path / "metadata.parquet").write_bytes(b"PAR1 not really")
        with pytest.raises(ValueError, match=r"metadata\.parquet' is not valid Parquet"):
            ImageFolder(tmp_path, SIZES)

    def test_an_unknown_column(self, tmp_path):
        write_images(tmp_path, "a.png")
        (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
        with pytest.raises(ValueError, match=r"there is no `prompt`, only \['file_name', 'text'\]"):
            ImageFolder(tmp_path, SIZES, caption_column="prompt")

    def test_two_files_of_metadata(self, tmp_path):
        write_images(tmp_path, "a.png")
        (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "y"}')
        with pytest.raises(ValueError, match="must have one file of metadata"):
            ImageFolder(tmp_path, SIZES)

    @pytest.mark.parametrize("kind", ["parent", "absolute", "hidden in a path"])
    @pytest.mark.parametrize("file", ["metadata.jsonl", "captions.jsonl"])
    def test_files_outside_are_refused_unless_asked_for(self, tmp_path, kind, file):
        write_images(tmp_path, "data/a.png", "secret.png")
        secret = tmp_path / "secret.png"
        name = {"parent": "../secret.png", "absolute": str(secret), "hidden in a path": "x/../../secret.png"}[kind]
        row = {"file_name": name, "text": "x", "captions": [{"model": "m", "text": "x"}]}
        (tmp_path / "data" / file).write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=rf"{file}'.*lies outside of the data folder"):
            ImageFolder(tmp_path / "data", SIZES)
        assert ImageFolder(tmp_path / "data", SIZES, allow_outside=True).paths == [secret]

    def test_captions_may_be_ignored(self, tmp_path):
        write_images(tmp_path, "a.png", "b.png")
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 3}')
        assert captions_of(tmp_path, captions="ignored") == {"a.png": ""}


class TestCaptionFiles:
    @pytest.mark.parametrize("suffix", ["txt", "caption"])
    def test_beside_images(self, tmp_path, suffix, caplog):
        write_images(tmp_path, "a.png", "sub/b.jpg")
        (tmp_path / f"a.{suffix}").write_text("a fox\n", "utf-8-sig")
        (tmp_path / "sub" / f"b.{suffix}").write_text(" größe ", "utf-8")
        assert captions_of(tmp_path) == {"a.png": "a fox", "sub/b.jpg": "größe"}
        assert captioned_folder(str(tmp_path), SIZES, "x").captions == ["a fox", "größe"]
        assert not caplog.text

    def test_of_another_encoding(self, tmp_path):
        write_images(tmp_path, "a.png")
        for encoding in ("cp1252", "utf-16"):
            (tmp_path / "a.txt").write_text("it\u2019s", encoding)
            with pytest.raises(ValueError, match=r"a\.txt' must be UTF-8"):
                ImageFolder(tmp_path, SIZES)

    def test_fill_empty_places_of_metadata(self, tmp_path):
        write_images(tmp_path, "a.png", "b.png")
        (tmp_path / "metadata.csv").write_text("file_name,text\na.png,\nb.png,from metadata\n")
        (tmp_path / "a.txt").write_text("from a file")
        assert captions_of(tmp_path) == {"a.png": "from a file", "b.png": "from metadata"}

    def test_several_captions_of_each_image(self, tmp_path):
        write_images(tmp_path, "a.png")
        line = {"file_name": "a.png", "captions": [{"model": "m", "text": "one", "clip_score": 2.0}]}
        file = tmp_path / "captions.jsonl"
        file.write_text("\ufeff" + json.dumps(line), "utf-8")  # an editor need not end the last line
        assert captions_of(tmp_path) == {"a.png": "one"}
        file.write_text(json.dumps(line) + '\n{"file_name": "a.png", "capt')  # killed while it was written
        assert captions_of(tmp_path) == {"a.png": "one"}
        for wrong in (
            '{"file_name": "a.png"}',
            '{"file_name": 3, "captions": []}',
            "[]",
            '{"file_name": "a.png", "captions": [{"model": "m", "text": 3}]}',
        ):
            file.write_text(json.dumps(line) + f"\n{wrong}\n")
            with pytest.raises(ValueError, match=r"captions\.jsonl', line 2: a line must have"):
                read_captions(file)


class TestWarnings:
    def test_images_without_captions(self, tmp_path, caplog):
        write_images(tmp_path, "a.png", "b.png", "c.png")
        FolderSource(tmp_path)
        assert "`data` has no captions" in caplog.text
        caplog.clear()
        (tmp_path / "a.txt").write_text("a fox")
        FolderSource(tmp_path)
        assert "2 images have no caption, though others have one. The first is 'b.png'" in caplog.text
        caplog.clear()
        FolderSource(tmp_path, captions="ignored")
        assert not caplog.text

    @pytest.mark.parametrize("name", ["a.json", "a.png.txt", "captions.txt", "labels.csv", "data.jsonl", "b.caption"])
    def test_captions_that_nothing_reads(self, tmp_path, caplog, name):
        write_images(tmp_path, "a.png")
        (tmp_path / "README.txt").write_text("where it is from")
        (tmp_path / name).write_text("{}")
        captioned_folder(str(tmp_path), SIZES, "a photo of sks dog")
        assert "1 files that look like captions are not read" in caplog.text
        assert name in caplog.text

    def test_images_that_are_left_out(self, tmp_path, caplog):
        write_images(tmp_path, "a.png", "b.png")
        (tmp_path / "c.heic").write_bytes(b"")
        (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
        FolderSource(tmp_path)
        assert "1 images are left out, because the metadata does not list them" in caplog.text
        assert "c.heic" in caplog.text

    def test_hidden_files(self, tmp_path):
        write_images(tmp_path, "a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "._a.png")
        assert captions_of(tmp_path) == {"a.png": ""}


class TestSplits:
    def test_the_wanted_one_is_taken(self, tmp_path, caplog):
        write_images(tmp_path, "train/a.png", "test/b.png", "val/c.png")
        (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/a.png,x\ntest/b.png,y\nval/c.png,z\n")
        assert captions_of(tmp_path) == {"train/a.png": "x"}
        assert "2 images that are not in 'train' are left out" in caplog.text
        assert captions_of(tmp_path, split="validation") == {"val/c.png": "z"}
        assert len(captions_of(tmp_path, split="")) == 3
        with pytest.raises(ValueError, match="`data_split` must be a subfolder of"):
            FolderSource(tmp_path, split="more")

    def test_folders_of_other_names_are_no_splits(self, tmp_path):
        write_images(tmp_path, "train/a.png", "plane/b.png")  # classes of vehicles
        assert len(captions_of(tmp_path)) == 2


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def samples(*levels):
    files = {}
    for level in levels:
        files[f"00/{level:03d}.jpg"] = as_bytes(plain_image(level, (8 + 8 * (level % 2), 8)), "jpeg")
        files[f"00/{level:03d}.txt"] = f"level {level}".encode("utf-8-sig")
    return files


class TestTars:
    def test_samples(self, tmp_path):
        write_tar(tmp_path / "00.tar", samples(0, 100))
        write_tar(tmp_path / "01.tar", samples(200))
        config = ImageDataOptions(data=str(tmp_path / "{00..01}.tar"))
        images = load_images(config, [(8, 8), (8, 16)])
        assert images.captions == ["level 0", "level 100", "level 200"]
        for index, level in enumerate([0, 100, 200]):
            assert images[index]["pixel_values"][0].mean() == pytest.approx(level / 127.5 - 1, abs=0.02)
        for data in (tmp_path, tmp_path / "*.tar", tmp_path / "{00,01}.tar"):
            assert load_images(ImageDataOptions(data=str(data)), [(8, 8)]).captions == images.captions

    def test_captions_in_json(self, tmp_path):
        for key, options in {"text": {}, "caption": {}, "prompt": {"caption_column": "prompt"}}.items():
            files = {"a.png": as_bytes(plain_image()), "a.json": json.dumps({key: "a fox", "url": "x"}).encode()}
            write_tar(tmp_path / "a.tar", files)
            assert TarSource([tmp_path / "a.tar"], **options).captions == ["a fox"]
        write_tar(tmp_path / "a.tar", files | {"a.json": b'{"text": 5}'})
        with pytest.raises(ValueError, match=r"a\.tar/a\.json: `text` must be a string, got 5"):
            TarSource([tmp_path / "a.tar"])

    def test_two_images_in_a_sample(self, tmp_path):
        files = {
            "a.png": as_bytes(plain_image(10)),
            "a.seg.png": as_bytes(plain_image(20)),
            "a.jpg": as_bytes(plain_image(30), "jpeg"),
        }
        write_tar(tmp_path / "a.tar", files)
        with pytest.raises(ValueError, match=r"'a.tar/a' must have one image, got \['png', 'jpg'\]"):
            TarSource([tmp_path / "a.tar"])
        assert TarSource([tmp_path / "a.tar"], image_column="seg.png").open(0).read() == files["a.seg.png"]

    @pytest.mark.parametrize("lost", [300, 1300, 9000])
    def test_cut_off(self, tmp_path, lost):
        write_tar(tmp_path / "a.tar", samples(*range(10)))
        content = (tmp_path / "a.tar").read_bytes().rstrip(b"\0")
        (tmp_path / "a.tar").write_bytes(content[:-lost])
        with pytest.raises(ValueError, match=r"a\.tar' cannot be read as an uncompressed tar"):
            TarSource([tmp_path / "a.tar"])

    def test_damaged_header(self, tmp_path):
        write_tar(tmp_path / "a.tar", samples(*range(10)))
        content = bytearray((tmp_path / "a.tar").read_bytes())
        content[content.index(b"00/005.jpg")] ^= 255
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(ValueError, match="damaged at byte"):
            TarSource([tmp_path / "a.tar"])

    def test_compressed(self, tmp_path):
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
            pass
        with pytest.raises(ValueError, match="cannot be read as an uncompressed tar"):
            TarSource([tmp_path / "a.tar.gz"])

    def test_damaged_images_are_named(self, tmp_path):
        write_tar(tmp_path / "a.tar", {"x.png": as_bytes(plain_image())[:-30], "x.txt": b"x"})
        with pytest.raises(ValueError, match=r"'a\.tar/x' cannot be read as an image"):
            load_images(ImageDataOptions(data=str(tmp_path / "a.tar")), [(8, 8)])[0]

    def test_absent(self, tmp_path):
        with pytest.raises(ValueError, match="`data` must be tars, but there is no file"):
            load_images(ImageDataOptions(data=str(tmp_path / "{0..3}.tar")), [(8, 8)])


def rows(count=4, column="text"):
    features = datasets.Features({"image": datasets.Image(), column: datasets.Value("string")})
    images = [{"bytes": as_bytes(plain_image(10 * i, (8 + 8 * (i % 2), 8))), "path": None} for i in range(count)]
    return datasets.Dataset.from_dict({"image": images, column: [f"row {i}" for i in range(count)]}, features)


class TestHub:
    def test_a_folder_as_the_hub_has_it(self, tmp_path, monkeypatch):
        (tmp_path / "owner" / "name" / "data").mkdir(parents=True)
        rows().to_parquet(tmp_path / "owner" / "name" / "data" / "train-00000-of-00001.parquet")
        monkeypatch.chdir(tmp_path)
        images = load_images(ImageDataOptions(data="owner/name"), [(8, 8), (8, 16)])
        assert images.captions == [f"row {i}" for i in range(4)]
        assert images.sizes_of_items == [(8, 8), (8, 16), (8, 8), (8, 16)]
        assert images[3]["pixel_values"][0].unique().item() == pytest.approx(30 / 127.5 - 1)

    def test_saved_to_disk(self, tmp_path):
        rows(column="caption").save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"train": rows(2), "test": rows(3)}).save_to_disk(tmp_path / "two")
        assert len(load_images(ImageDataOptions(data=str(tmp_path / "one")), [(8, 8)])) == 4
        assert len(load_images(ImageDataOptions(data=str(tmp_path / "two"), data_split="test"), [(8, 8)])) == 3
        with pytest.raises(ValueError, match="`datasets` cannot load"):
            load_images(ImageDataOptions(data=str(tmp_path / "two"), data_split="more"), [(8, 8)])

    def test_columns(self, tmp_path):
        features = datasets.Features(
            {"img": datasets.Image(), "mask": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        )
        image = {"bytes": as_bytes(plain_image()), "path": None}
        datasets.Dataset.from_dict({"img": [image], "mask": [image], "label": [1]}, features).save_to_disk(tmp_path)
        with pytest.raises(ValueError, match="`image_column` must name the column of images"):
            HubSource(str(tmp_path))
        assert HubSource(str(tmp_path), image_column="img", caption_column="label").captions == ["dog"]
        with pytest.raises(ValueError, match="`caption_column` must be one of"):
            HubSource(str(tmp_path), image_column="img", caption_column="text")

    def test_captions_that_are_no_strings(self, tmp_path):
        rows().map(
            lambda row: {"text": [row["text"]]},
            features=datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))}),
        ).save_to_disk(tmp_path)
        with pytest.raises(ValueError, match="/0': `text` must be a string"):
            HubSource(str(tmp_path))

    def test_a_name_that_nothing_has(self, monkeypatch):
        with pytest.raises(
            ValueError, match="`data` must be a folder, tars or a dataset of the Hub, got 'nobody/nothing'"
        ):
            load_images(ImageDataOptions(data="nobody/nothing"), [(8, 8)])
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"pip install 'diffusers_sana\[data\]'"):
            load_images(ImageDataOptions(data="nobody/nothing"), [(8, 8)])


class TestEverySource:
    @pytest.fixture(params=["folder", "tar", "hub"])
    def data(self, request, tmp_path):
        if request.param == "tar":
            write_tar(tmp_path / "a.tar", samples(*range(9)))
        elif request.param == "hub":
            rows(9).save_to_disk(tmp_path)
        else:
            for name, content in samples(*range(9)).items():
                (tmp_path / Path(name).parent).mkdir(exist_ok=True)
                (tmp_path / name).write_bytes(content)
        return str(tmp_path)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_resumes_at_the_batch(self, data, num_workers):
        images = load_images(ImageDataOptions(data=data), [(8, 8), (8, 16)])
        load = make_loader(images, 2, seed=0, num_workers=num_workers)
        whole = list(islice(load(0), 8))
        assert len({text for batch in whole[:5] for text in batch["text"]}) == 9
        for batch, again in zip(whole[3:], islice(load(3), 5), strict=True):
            assert batch["text"] == again["text"]
            assert torch.equal(batch["pixel_values"], again["pixel_values"])

    def test_stamps_and_digests_tell_images_apart(self, data):
        source = load_images(ImageDataOptions(data=data), [(8, 8)]).source
        again = load_images(ImageDataOptions(data=data), [(8, 8)]).source
        stamps = [source.stamp(index) for index in range(9)]
        assert stamps == [again.stamp(index) for index in range(9)]
        assert all(stamps)
        assert len({image_digest(source, index) for index in range(9)}) == 9
