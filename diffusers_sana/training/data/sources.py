"""Where training images come from: a folder, WebDataset tars, or a dataset that 🤗 Datasets loads.

A source gives each image by its index, with name and caption. Any image can be read at any time, so that an order of
images can be shuffled over all of them and resumed at any place; that is why tars are read by their index of members
and not as a stream.
"""

import glob
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from diffusers_sana.files import IMAGE_SUFFIXES, digest, read_text
from diffusers_sana.training.config import ImageDataOptions
from diffusers_sana.training.data.captions import CAPTIONS_FILE, Caption, best_caption, read_captions
from diffusers_sana.training.data.metadata import (
    CAPTION_SUFFIXES,
    METADATA_FILES,
    TEXT_COLUMNS,
    Row,
    inside,
    path_of,
    read_rows,
    text_of,
)


logger = logging.getLogger(__name__)

# "expected": missing ones are warned about. "optional": they are left "". "ignored": none is read.
Captions = Literal["expected", "optional", "ignored"]

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
UNREAD = (".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg", ".tar", ".zip")
LIKE_CAPTIONS = (".caption", ".captions", ".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt")
NO_CAPTIONS = ("license", "readme")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ImageSource(Protocol):
    """Images by index.

    Attributes:
        names: of each image, for errors and records.
        captions: of each image; "" for none.
        choices: all captions of each image, for `SampledCaptions`; None where each has at most one.
    """

    names: list[str]
    captions: list[str]
    choices: list[list[Caption]] | None

    def open(self, index: int) -> Path | BinaryIO:
        """What `diffusers_sana.images` reads the image from."""
        ...

    def stamp(self, index: int) -> str:
        """Changes whenever the image might have changed; cheap."""
        ...


def image_digest(source: ImageSource, index: int) -> str:
    """A name of the bytes of an image."""
    file = source.open(index)
    return digest(file if isinstance(file, Path) else file.read())


class FolderSource:
    """The images in a folder and its subfolders, in sorted order, without hidden files.

    Captions come from `captions.jsonl` of the folder, else from `metadata.jsonl`, `.csv` or `.parquet` in it or in
    subfolders, and where these have none from `NAME.txt` or `NAME.caption` beside `NAME.png`. Where there is one of
    the first two, only the images that it lists are taken.

    Args:
        folder: the folder.
        split: which of the subfolders is taken if all of them are named like splits: "train", "test", ...; "" for all.
        caption_column: of the metadata; "" for `text` or `caption`.
        captions: see `Captions`.
        allow_outside: also take files outside of the folder that its metadata names.
        use_captions_file: False reads what an image came with, as if there were no `captions.jsonl`.
        suffixes: of the files that count as images.

    Attributes:
        paths: of the images that are taken.
        images: all image files of the folder, taken or not.

    Raises:
        ValueError: there are no images, or the metadata is wrong; with file and line.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "train",
        caption_column: str = "",
        captions: Captions = "expected",
        allow_outside: bool = False,
        use_captions_file: bool = True,
        suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    ):
        self.suffixes = suffixes
        self.root, self.caption_column, self.allow_outside = Path(folder), caption_column, allow_outside
        self.choices: list[list[Caption]] | None = None
        self.paths: list[Path] = []
        self.captions: list[str] = []
        self._read: set[Path] = set()  # files of captions
        files = self._files(split)
        self.images = [path for path in files if path.suffix.lower() in suffixes]
        metadata = [path for path in files if path.name in METADATA_FILES]
        if use_captions_file and self.root / CAPTIONS_FILE in files:
            self._take_choices()
            self._read |= {self.root / CAPTIONS_FILE, *metadata}
        elif metadata:
            self._take_rows(metadata, set(files), captions)
        else:
            self.paths = self.images
            self.captions = [self._beside(path, set(files)) if captions != "ignored" else "" for path in self.paths]
        if not self.paths:
            raise ValueError(
                f"`data` must be a folder with images ({', '.join(suffixes)}), WebDataset tars or the name of a"
                f" dataset of the Hub, got {str(folder)!r}. Check the path."
            )
        self.names = [Path(os.path.relpath(path, self.root)).as_posix() for path in self.paths]
        if use_captions_file:
            self._warn(files, captions)

    def open(self, index: int) -> Path:
        """The path of an image."""
        return self.paths[index]

    def stamp(self, index: int) -> str:
        """Size and time of change of an image's file."""
        return file_stamp(self.paths[index])

    def _files(self, split: str) -> list[Path]:
        """All files that are not hidden, of one split where there are some."""
        files, left_out = [], 0
        self._other_splits = self._splits_but(split)
        for path in sorted(self.root.rglob("*")):
            top, *_ = parts = path.relative_to(self.root).parts
            if any(part.startswith((".", "__")) for part in parts) or not path.is_file():
                continue
            if top in self._other_splits:
                left_out += path.suffix.lower() in self.suffixes
            else:
                files.append(path)
        if left_out:
            logger.warning(f"`data` has splits: {left_out} images that are not in {split!r} are left out.")
        return files

    def _splits_but(self, split: str) -> set[str]:
        """Subfolders of other splits, if all subfolders are splits."""
        if not split or not self.root.is_dir():
            return set()
        tops = {path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
        known = {name for names in SPLITS.values() for name in names} | {split}
        wanted = tops & {split, *SPLITS.get(split, ())}
        if split != "train" and not wanted:
            raise ValueError(f"`data_split` must be a subfolder of {str(self.root)!r}, got {split!r}.")
        return tops - wanted if wanted and tops <= known else set()

    def _is_of_another_split(self, name: Any, folder: Path) -> bool:
        return folder == self.root and isinstance(name, str) and name.split("/")[0] in self._other_splits

    def _take_choices(self) -> None:
        file = self.root / CAPTIONS_FILE
        found = {
            name: captions
            for name, captions in read_captions(file).items()
            if not self._is_of_another_split(name, self.root)
        }
        self.paths = [inside(self.root / name, self.root, repr(str(file)), self.allow_outside) for name in found]
        absent = [path for path in self.paths if not path.is_file()]
        if absent:
            raise ValueError(f"{str(file)!r} names {len(absent)} images that are not there, {str(absent[0])!r} first.")
        self.choices = list(found.values())
        self.captions = [best_caption(captions).text for captions in self.choices]

    def _take_rows(self, metadata: list[Path], files: set[Path], captions: Captions) -> None:
        folders = [path.parent for path in metadata]
        if len(set(folders)) < len(folders):
            twice = max(folders, key=folders.count)
            raise ValueError(f"{str(twice)!r} must have one file of metadata, but has several. Remove all but one.")
        for file in metadata:
            self._read.add(file)
            for where, row in read_rows(file):
                if self._is_of_another_split(row.get("file_name"), file.parent):
                    continue
                path = path_of(row, where, file.parent, self.root, self.allow_outside)
                self.paths.append(path)
                self.captions.append("" if captions == "ignored" else self._caption(row, where, path, files, captions))

    def _caption(self, row: Row, where: str, path: Path, files: set[Path], captions: Captions) -> str:
        text = text_of(row, where, self.caption_column)
        if text:
            return text
        beside = self._beside(path, files)
        if text is None and not beside and captions == "expected":
            raise ValueError(
                f"{where}: a row must have a caption as `text` or `caption`, got {sorted(row)}. Name its column with"
                " `caption_column`."
            )
        return beside

    def _beside(self, image: Path, files: set[Path]) -> str:
        """The caption in the file of an image's own name, "" without one."""
        for suffix in CAPTION_SUFFIXES:
            path = image.with_suffix(suffix)
            if path in files:
                self._read.add(path)
                return read_text(path).strip()
        return ""

    def _warn(self, files: list[Path], captions: Captions) -> None:
        """Says what the user may have meant to be used, and is not."""
        taken = set(self.paths)
        _warn_of(
            "images are left out, because the metadata does not list them",
            [path for path in self.images if path not in taken],
        )
        _warn_of(
            "files are left out, which may be or hold images, because their format is not read here; convert them",
            [path for path in files if path.suffix.lower() in UNREAD],
        )
        if captions != "ignored":
            _warn_of(
                "files that look like captions are not read; captions are read from captions.jsonl, from"
                f" {', '.join(METADATA_FILES)}, and from NAME.txt beside NAME.png",
                [path for path in files if _looks_like_captions(path) and path not in self._read],
            )
        if captions == "expected":
            _warn_of_missing_captions(self)


class TarSource:
    """The samples of WebDataset tars: files of one name up to its first dot, which follow each other.

    The caption is that of `NAME.txt` or `NAME.caption`, else `text` or `caption` in `NAME.json`. The tars are not
    unpacked; they must not be compressed.

    Args:
        paths: of the tars.
        image_column: suffix of the images, such as "jpg"; "" for the only image in each sample.
        caption_column: suffix of the captions, or their key in `NAME.json`; "" as above.
        captions: see `Captions`.

    Raises:
        ValueError: a file is no tar or cut off, or a sample is not as above.
    """

    choices: list[list[Caption]] | None = None

    def __init__(
        self, paths: list[Path], image_column: str = "", caption_column: str = "", captions: Captions = "expected"
    ):
        self.paths, self.image_column, self.caption_column = paths, image_column, caption_column
        self.names: list[str] = []
        self.captions: list[str] = []
        self.places: list[tuple[Path, int, int]] = []  # tar, first byte, number of bytes
        without = []
        for path in paths:
            for key, members in _samples(path):
                name = f"{path.name}/{key}"
                image = self._image(members, name)
                if image is None:
                    without.append(name)
                    continue
                self.names.append(name)
                self.places.append((path, image.offset_data, image.size))
                self.captions.append("" if captions == "ignored" else self._caption(path, members, name))
        if not self.names:
            raise ValueError(f"`data` must be WebDataset tars with images, but {str(paths[0])!r} has none.")
        _warn_of("samples without an image are left out", without)
        if captions == "expected":
            _warn_of_missing_captions(self)

    def open(self, index: int) -> BinaryIO:
        """The bytes of an image."""
        path, start, size = self.places[index]
        with open(path, "rb") as file:
            file.seek(start)
            return io.BytesIO(file.read(size))

    def stamp(self, index: int) -> str:
        """Place of an image in its tar, and the tar's size and time of change."""
        path, start, size = self.places[index]
        return f"{start}-{size}-{file_stamp(path)}"

    def _image(self, members: dict[str, tarfile.TarInfo], name: str) -> tarfile.TarInfo | None:
        suffixes = [self.image_column] if self.image_column else [s for s in members if f".{s}" in IMAGE_SUFFIXES]
        if len(suffixes) > 1:
            raise ValueError(f"{name!r} must have one image, got {suffixes}. Choose one with `image_column`.")
        return members.get(suffixes[0]) if suffixes else None

    def _caption(self, path: Path, members: dict[str, tarfile.TarInfo], name: str) -> str:
        wanted = [self.caption_column] if self.caption_column else [suffix[1:] for suffix in CAPTION_SUFFIXES]
        for suffix in wanted:
            if suffix in members:
                return _text_in(path, members[suffix], name).strip()
        if "json" in members:
            try:
                row = json.loads(_text_in(path, members["json"], name))
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}.json is not valid JSON: {error}.") from None
            return (text_of(row, f"{name}.json", self.caption_column) or "") if isinstance(row, dict) else ""
        return ""


class HubSource:
    """A dataset that 🤗 Datasets loads: by its name on the Hub, from a folder of Parquet files, or saved to disk.

    Args:
        name: of the dataset, or a folder.
        config: name of its configuration; "" for its only one.
        split: of the dataset.
        image_column: "" for the only one that holds images.
        caption_column: "" for `text` or `caption`.
        captions: see `Captions`.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: there is no such dataset, or no such column.
    """

    choices: list[list[Caption]] | None = None

    def __init__(
        self,
        name: str,
        config: str = "",
        split: str = "train",
        image_column: str = "",
        caption_column: str = "",
        captions: Captions = "expected",
    ):
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"`data` is {name!r}, which is no folder here and no tar. To load it as a dataset of the Hub, install"
                " `datasets`: pip install 'diffusers_sana[data]'."
            ) from error
        self.name = name
        rows = _load(datasets, name, config, split)
        columns = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if image_column:
            columns = [image_column] if image_column in rows.features else []
        if len(columns) != 1:
            raise ValueError(
                f"`image_column` must name the column of images in {name!r}, got {image_column!r}; there are"
                f" {sorted(rows.features)}."
            )
        self.image_column = columns[0]
        self.rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        self.names = [f"{name}/{index}" for index in range(len(rows))]
        files = [Path(file["filename"]) for file in rows.cache_files]
        self._stamp = digest([[str(path), file_stamp(path)] for path in files]) if files else ""
        self.captions = [""] * len(rows)
        if captions != "ignored":
            self._take_captions(datasets, caption_column)
        if captions == "expected":
            _warn_of_missing_captions(self)

    def open(self, index: int) -> Path | BinaryIO:
        """The bytes of an image, or its path."""
        image = self.rows[index][self.image_column]
        if image is None:
            raise ValueError(f"{self.names[index]!r} must have an image as `{self.image_column}`, got None.")
        return Path(image["path"]) if image["bytes"] is None else io.BytesIO(image["bytes"])

    def stamp(self, index: int) -> str:
        """The files of the dataset, with sizes and times of change; "" for a dataset in memory."""
        return self._stamp and f"{self._stamp}-{index}"

    def _take_captions(self, datasets: Any, column: str) -> None:
        features = self.rows.features
        names = [name for name in ([column] if column else TEXT_COLUMNS) if name in features]
        if column and not names:
            raise ValueError(f"`caption_column` must be one of {sorted(features)} in {self.name!r}, got {column!r}.")
        if not names:
            return
        columns = self.rows.select_columns(names)[:]
        for name in names:
            if isinstance(features[name], datasets.ClassLabel):
                columns[name] = features[name].int2str(columns[name])
        for index, values in enumerate(zip(*columns.values(), strict=True)):
            row = dict(zip(columns, values, strict=True))
            self.captions[index] = text_of(row, repr(self.names[index]), column) or ""


def find_source(options: ImageDataOptions, captions: Captions = "expected") -> ImageSource:
    """The images that `options.data` names.

    Raises:
        ImportError, ValueError: those of the sources.
    """
    root = Path(options.data)
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in root.rglob("*")):
        return FolderSource(root, options.data_split, options.caption_column, captions, options.allow_outside)
    if tars := _tars(options.data):
        if options.data_split != "train":
            raise ValueError(f"`data_split` must be left out for tars, got {options.data_split!r}. Name their files.")
        return TarSource(tars, options.image_column, options.caption_column, captions)
    if options.data and (_is_saved_dataset(root) or (not root.exists() and HUB_NAME.fullmatch(options.data))):
        return HubSource(
            options.data,
            options.data_config,
            options.data_split,
            options.image_column,
            options.caption_column,
            captions,
        )
    return FolderSource(root, options.data_split, options.caption_column, captions, options.allow_outside)


def _tars(data: str) -> list[Path]:
    """The tars that a path, a pattern or a folder stands for."""
    if Path(data).is_dir():
        return sorted(Path(data).rglob("*.tar"))
    if ".tar" not in data:
        return []
    found = [Path(path) for pattern in _expanded(data) for path in sorted(glob.glob(pattern))]
    if not found:
        raise ValueError(f"`data` must be tars, but there is no file {data!r}. Check the path.")
    return found


def _expanded(pattern: str) -> Iterator[str]:
    """The names that braces stand for: `{00..12}` for numbers and `{a,b}` for a choice."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    choices: Iterable[str] = match[1].split(",")
    if numbers:
        choices = (f"{number:0{len(numbers[1])}d}" for number in range(int(numbers[1]), int(numbers[2]) + 1))
    for choice in choices:
        yield from _expanded(pattern[: match.start()] + choice + pattern[match.end() :])


def _is_saved_dataset(folder: Path) -> bool:
    """Whether a folder without images has a dataset's tables."""
    return any(path.suffix in (".parquet", ".arrow") for path in folder.rglob("*"))


def _load(datasets: Any, name: str, config: str, split: str) -> Any:
    """One split of a dataset, by its rows."""
    try:
        if not any((Path(name) / file).exists() for file in ("dataset_dict.json", "state.json")):
            return datasets.load_dataset(name, config or None, split=split)
        saved = datasets.load_from_disk(name)
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        raise ValueError(
            f"`data` must be a folder, tars or a dataset of the Hub, got {name!r}, which is no folder here and which"
            f" `datasets` cannot load: {error}"
        ) from error


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The samples of a tar: the name, and the files by suffix."""
    key, end, members = "", 0, dict[str, tarfile.TarInfo]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                end = member.offset_data + -(-member.size // 512) * 512
                folder, _, file = member.name.rpartition("/")
                if not member.isreg() or file.startswith(".") or "." not in file:
                    continue
                stem, _, suffix = file.partition(".")
                if f"{folder}/{stem}" != key:
                    if members:
                        yield key.lstrip("/"), members
                    key, members = f"{folder}/{stem}", {}
                if suffix.lower() in members:
                    raise tarfile.ReadError(f"it has {member.name} twice")
                members[suffix.lower()] = member
        with open(path, "rb") as content:
            content.seek(end)
            if content.read(512) != bytes(512):  # `tarfile` stops without a word
                raise tarfile.ReadError(f"it is cut off or damaged at byte {end}")
    except tarfile.TarError as error:
        raise ValueError(f"{str(path)!r} cannot be read as an uncompressed tar: {error}.") from error
    if members:
        yield key.lstrip("/"), members


def _text_in(path: Path, member: tarfile.TarInfo, name: str) -> str:
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        content = file.read(member.size)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name!r} must have a caption in UTF-8, but byte {error.start} is not.") from None


def file_stamp(path: Path) -> str:
    """Size and time of change of a file."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def _looks_like_captions(path: Path) -> bool:
    return path.suffix.lower() in LIKE_CAPTIONS and not path.stem.lower().startswith(NO_CAPTIONS)


def _warn_of(what: str, paths: list[Any]) -> None:
    if paths:
        logger.warning(f"`data`: {len(paths)} {what}. The first is {str(paths[0])!r}.")


def _warn_of_missing_captions(source: ImageSource) -> None:
    without = [name for name, caption in zip(source.names, source.captions, strict=True) if not caption]
    if len(without) == len(source.names):
        logger.warning("`data` has no captions, so that nothing is learnt about prompts.")
    else:
        _warn_of("images have no caption, though others have one", without)
