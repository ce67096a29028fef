"""Text files beside images: `metadata.jsonl`, `metadata.csv`, `metadata.parquet` and captions `NAME.txt`.

The layouts are those of the `imagefolder` of 🤗 Datasets and of kohya's trainers. A row is a mapping of column names
to values; `where` says in errors which line of which file is wrong.
"""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers_sana.files import read_json_lines, read_text


METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_SUFFIXES = (".txt", ".caption")  # of NAME.txt beside NAME.png
TEXT_COLUMNS = ("text", "caption")

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """The rows of a metadata file, each with where it is.

    Raises:
        ValueError: the file is not of its format, with the line.
        ImportError: a Parquet file without pyarrow.
    """
    read = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix]
    return read(path)


def text_of(row: Row, where: str, column: str = "") -> str | None:
    """The caption in a row, None if it has none.

    Args:
        row: of a metadata file or a dataset.
        where: it is, for errors.
        column: that has the caption; "" for one of `text` and `caption`.

    Raises:
        ValueError: the caption is no string, the row lacks `column`, or it has both `text` and `caption`.
    """
    names = [column] if column else [name for name in TEXT_COLUMNS if name in row]
    if not names:
        return None
    if column and column not in row:
        raise ValueError(f"{where}: there is no `{column}`, only {sorted(map(str, row))}. Change `caption_column`.")
    if len(names) > 1:
        raise ValueError(f"{where}: there are `text` and `caption`. Choose one of them with `caption_column`.")
    text = row[names[0]]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: `{names[0]}` must be a string, got {text!r}.")
    return text


def path_of(row: Row, where: str, folder: Path, root: Path, allow_outside: bool = False) -> Path:
    """The file that a row of metadata names.

    Args:
        row: with `file_name`, relative to `folder`.
        where: it is, for errors.
        folder: that of the metadata file.
        root: the data folder, which `folder` is in.
        allow_outside: also take files outside of `root`. Metadata of others could name any image of this machine.

    Raises:
        ValueError: there is no `file_name`, no such file, or it lies outside of `root`.
    """
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: `file_name` must name an image, got {name!r} among {sorted(map(str, row))}.")
    path = inside(folder / name, root, where, allow_outside)
    if not path.is_file():
        raise ValueError(f"{where}: there is no file {str(path)!r}. Paths are relative to the folder of the metadata.")
    return path


def inside(path: Path, root: Path, where: str, allow_outside: bool = False) -> Path:
    """The path, without `..`, if it is within `root`; symbolic links are followed, as their owner has made them.

    Raises:
        ValueError: it is not, and `allow_outside` is not set.
    """
    normal = Path(os.path.normpath(path))
    if not allow_outside and not normal.is_relative_to(os.path.normpath(root)):
        raise ValueError(
            f"{where}: {str(path)!r} lies outside of the data folder {str(root)!r}. If you trust whoever wrote that,"
            " set `allow_outside`."
        )
    return normal


def _json_rows(path: Path) -> list[tuple[str, Row]]:
    rows = [(f"{str(path)!r}, line {number}", row) for number, row in read_json_lines(path)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a line must be an object such as {{'file_name': ...}}, got {row!r}.")
    return rows


def _csv_rows(path: Path) -> list[tuple[str, Row]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    rows: list[tuple[str, Row]] = []
    try:
        for row in reader:
            where = f"{str(path)!r}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{where}: it must have {len(reader.fieldnames or ())} fields. Quote those with commas."
                )
            rows.append((where, row))
    except csv.Error as error:
        raise ValueError(f"{str(path)!r}, line {reader.line_num}: not valid CSV: {error}.") from error
    return rows


def _parquet_rows(path: Path) -> list[tuple[str, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{str(path)!r} needs pyarrow: pip install 'diffusers_sana[data]'.") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{str(path)!r} is not valid Parquet: {error}.") from error
    return [(f"{str(path)!r}, row {number}", row) for number, row in enumerate(rows, start=1)]
