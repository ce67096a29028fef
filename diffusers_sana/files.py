"""Files on disk: text as people write it, writes that are complete or absent, folders that one process owns.

Everything in the package that reads a text file, replaces a file, or takes a result on disk for finished uses these
functions, so that encodings, kills, full disks and second processes are handled in one place. Its import
is cheap: the command line reads files before it loads anything else.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


PathLike = str | os.PathLike[str]
IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def read_text(path: PathLike) -> str:
    """The text of a UTF-8 file, with or without a byte order mark, with line ends as they are.

    Raises:
        ValueError: the file is not UTF-8; the message names it.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} must be UTF-8 text, but byte {error.start} is not. Save the file as UTF-8."
        ) from None


def read_json(path: PathLike) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: the file is not JSON; the message names it and the line.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error.msg} in line {error.lineno}.") from None


def read_lines(path: PathLike) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number from 1.

    Lines end at line feeds only, perhaps after a carriage return. `str.splitlines` would also split at characters
    such as U+2028, which JSON strings and prompts may hold.
    """
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(number, line.removesuffix("\r")) for number, line in lines if line.strip()]


def read_json_lines(path: PathLike, *, may_be_torn: bool = False) -> list[tuple[int, Any]]:
    """The values of a JSON Lines file, each with its line number from 1; blank lines are left out.

    Args:
        path: the file.
        may_be_torn: drop a last line that is not JSON, as a kill during a write leaves it.

    Raises:
        ValueError: a line is not JSON; the message names the file and the line.
    """
    rows: list[tuple[int, Any]] = []
    lines = read_lines(path)
    for position, (number, line) in enumerate(lines):
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            if may_be_torn and position == len(lines) - 1:
                break
            raise ValueError(f"{str(path)!r}, line {number}: not valid JSON: {error.msg}.") from None
    return rows


def safetensors_header(path: PathLike) -> dict[str, Any]:
    """Name -> dtype, shape and offsets of the tensors in a safetensors file.

    Raises:
        ValueError: the file is not one, or it is cut off; the message names it.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = file.read(length) if 2 <= length <= size - 8 else b""
    try:
        header = json.loads(head)
        header.pop("__metadata__", None)
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{str(path)!r} is not a safetensors file, or it is damaged. Download it again.") from None
    if end > size:
        raise ValueError(f"{str(path)!r} is cut off: {size} of {end} bytes are there. Download it again.")
    return header


@contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Yields a new path beside `path` to write to, which takes the place of `path` at the end.

    `path` is never incomplete: after an error or a kill it is as it was before. The temporary name belongs to this
    call alone, so that two processes that write the same file do not disturb each other; it keeps the suffix, which
    some writers read the format from.
    """
    target = Path(path)
    temporary = target.with_name(f".{uuid.uuid4().hex[:12]}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


class UserError(RuntimeError):
    """Something that the user can correct; the message says what is wrong, what is safe, and what to do."""


class InUse(UserError):
    """Another process works on the same file or folder."""


@contextmanager
def locked(path: PathLike, activity: str) -> Iterator[None]:
    """Holds the lock file `path` for as long as the block runs. The system frees it when the process dies.

    Args:
        path: the lock file, which is made and left behind; its folder must exist.
        activity: what the holder does, for the message: "quantizes into 'out'".

    Raises:
        InUse: another process holds the lock.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InUse(
            f"Another process {activity}. Wait until it has ended, or choose another folder. (It holds {str(path)!r}.)"
        ) from None
    try:
        yield
    finally:
        lock.release()


def digest(*parts: Any) -> str:
    """A short hexadecimal name of everything that a result depends on.

    Args:
        parts: bytes, paths of files (their content counts, not their name), or values that JSON can hold.
    """
    result = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, bytes):
            content = part
        elif isinstance(part, os.PathLike):
            with open(part, "rb") as file:
                content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        else:
            content = json.dumps(part, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
        result.update(len(content).to_bytes(8, "little") + content)
    return result.hexdigest()


def model_identity(model: str, index: str = "model_index.json", revision: str | None = None) -> str:
    """What the name of a model stands for at present, without reading all of its weights.

    Args:
        model: a folder, or the id of a repository of the Hub.
        index: a file of the repository.
        revision: branch, tag or commit of the repository.

    Returns:
        For a folder a digest of names and sizes of its files, and of their first and last megabyte; for a repository
        the commit that is used.
    """
    if Path(model).is_dir():
        return digest(
            [[path.relative_to(model).as_posix(), _outline(path)] for path in sorted(Path(model).rglob("*"))]
        )
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    return Path(hf_hub_download(model, index, **options)).parent.name


def _outline(path: Path, size: int = 2**20) -> str:
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        length = path.stat().st_size
        head = file.read(size)
        file.seek(max(0, length - size))
        return digest(length, head, file.read(size))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between the recorded settings of a result and the present ones, one phrase per entry."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"`{prefix}{key}`: {_short(old)} there, {_short(new)} now")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
