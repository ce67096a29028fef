import ast
import json
import multiprocessing
from pathlib import Path

import pytest

from diffusers_sana import files


def test_text_with_and_without_byte_order_mark(tmp_path: Path):
    path = tmp_path / "caption.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes("a café".encode(encoding))
        assert files.read_text(path) == "a café"
    path.write_bytes("a café".encode("cp1252"))
    with pytest.raises(ValueError, match=r"caption\.txt.*UTF-8"):
        files.read_text(path)


def test_json_lines_end_at_line_feeds_only(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    texts = ["one\u2028two", "three\u0085four", "five\x0bsix"]
    lines = [json.dumps(text, ensure_ascii=False) for text in texts]
    path.write_bytes(("\ufeff" + lines[0] + "\r\n\n" + lines[1] + "\n" + lines[2]).encode())
    assert files.read_json_lines(path) == [(1, texts[0]), (3, texts[1]), (4, texts[2])]


def test_torn_last_line(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert files.read_json_lines(path, may_be_torn=True) == [(1, {"step": 1})]
    with pytest.raises(ValueError, match=r"log\.jsonl.*line 2"):
        files.read_json_lines(path)
    path.write_text('{"step\n{"step": 2}\n')  # torn in the middle is damage
    with pytest.raises(ValueError, match="line 1"):
        files.read_json_lines(path, may_be_torn=True)


def test_json_errors_name_the_file(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text("{\n x}")
    with pytest.raises(ValueError, match=r"config\.json.*line 2"):
        files.read_json(path)


def test_atomic_write(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail():
        with files.atomic_write(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    with files.atomic_write(path) as first, files.atomic_write(path) as second:
        assert first != second
        assert first.suffix == ".json"
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def _hold(path: str, held, release):
    with files.locked(path, "is busy"):
        held.set()
        release.wait(60)


def test_lock_is_between_processes(tmp_path: Path):
    path = tmp_path / ".lock"
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(path), held, release))
    process.start()
    assert held.wait(60)
    with (
        pytest.raises(RuntimeError, match="Another process quantizes into 'out'"),
        files.locked(path, "quantizes into 'out'"),
    ):
        pass
    process.kill()
    process.join()
    with files.locked(path, "is busy"):  # a process that was killed holds nothing
        pass


def test_digest(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = files.digest(path, {"b": 1, "a": [2.5, None]})
    assert first == files.digest(path, {"a": [2.5, None], "b": 1})
    path.write_bytes(b"two")
    assert first != files.digest(path, {"b": 1, "a": [2.5, None]})
    assert files.digest("ab", "c") != files.digest("a", "bc")


def test_differences():
    before, now = {"steps": 4, "model": {"name": "a", "rank": 8}}, {"steps": 4, "model": {"name": "b"}}
    assert files.differences(before, now) == [
        '`model.name`: "a" there, "b" now',
        "`model.rank`: 8 there, null now",
    ]


ROOT = Path(files.__file__).parents[1]
SCRIPTS = [
    path for top in ("diffusers_sana", "examples", "benchmarks", "comfyui") for path in (ROOT / top).rglob("*.py")
]


def test_every_text_file_is_utf_8_and_split_at_line_feeds():
    """The default encoding differs between systems, and `splitlines` splits at characters that texts may hold."""
    assert len(SCRIPTS) > 200
    found = []
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            call, keywords = ast.unparse(node), {keyword.arg for keyword in node.keywords}
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            is_text = name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)
            is_text = is_text and not call.startswith("files.")
            if isinstance(node.func, ast.Name) and name == "open":
                is_text = "b" not in (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
            if (is_text and "encoding" not in keywords) or (name == "splitlines" and "read" in call):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {call[:80]}")
    assert not found
