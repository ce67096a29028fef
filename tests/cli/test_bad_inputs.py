"""Every row of `bad_inputs.md`: one clear line, the right exit code, nothing loaded and nothing written."""

import json
import re
import shlex
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusers_sana.cli.record import KEY
from tests.cli.commands import run


TABLE = Path(__file__).with_name("bad_inputs.md")
ROWS = re.findall(r"^\| (.*?) ?\| ([12]) \| (.+) \|$", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
REPLACED = {"LONG": "a" * 300, "SURROGATE": "\ud800"}


def write_png(path: Path, width: int, height: int) -> None:
    """An image that says how large it is, without so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def write_record(path: Path, record: object) -> None:
    text = PngInfo()
    text.add_text(KEY, json.dumps(record))
    Image.new("RGB", (32, 32)).save(path, pnginfo=text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the table speaks of."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("cat", "mask", "there"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
            f"{folder}/{name}.png"
        )
    (folder / "text.png").write_text("not an image")
    (folder / "cut.png").write_bytes((folder / "cat.png").read_bytes()[:5000])
    (folder / "zero.png").touch()
    write_png(folder / "bomb.png", 20_000, 20_000)
    (folder / "link.png").symlink_to(folder / "gone.png")
    (folder / "prompts.txt").write_text("a fox\na cat\n")
    (folder / "blank.txt").write_text("\n  \n")
    (folder / "latin1.txt").write_bytes("a caf\xe9\n".encode("latin-1"))
    (folder / "broken.safetensors").write_text("not tensors, but long enough for a header")
    head = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (folder / "cut.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + b"\0" * 8)
    for name in ("weights.bin", "cut.pth"):
        (folder / name).write_bytes(b"PK\x03\x04 cut")
    for name in (
        "folder",
        "full",
        "flux",
        "video",
        "wan_video/vae",
        "wan_video/transformer",
        "causal",
        "plain",
        "with_controlnet",
        "cut_index",
        "list_index",
        "component",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "full" / "file.txt").write_text("here")
    indices = {"flux": "FluxPipeline", "video": "SanaVideoPipeline", "plain": "SanaPipeline"}
    for name, index in (indices | {"with_controlnet": "SanaControlNetPipeline"}).items():
        (folder / name / "model_index.json").write_text(json.dumps({"_class_name": index}))
    index = {"_class_name": "SanaVideoPipeline"}
    parts = {"vae": {"_class_name": "AutoencoderKLWan"}, "transformer": {"patch_size": [1, 2, 2]}}
    for name, config in parts.items():
        (folder / "wan_video" / name / "config.json").write_text(json.dumps(config))
    (folder / "wan_video" / "model_index.json").write_text(json.dumps(index))
    causal = {"transformer": ["diffusers", "SanaVideoCausalTransformer3DModel"]}
    (folder / "causal" / "model_index.json").write_text(json.dumps(index | causal))
    (folder / "cut_index" / "model_index.json").write_text("{")
    (folder / "list_index" / "model_index.json").write_text("[]")
    (folder / "component" / "config.json").write_text(json.dumps({"_class_name": "SanaTransformer2DModel"}))
    write_record(folder / "other_record.png", {"command": "rm"})
    record = {"inputs": {"--image": "0"}, "versions": {}}
    write_record(folder / "other_option.png", record | {"command": ["--execute=rm", "--", "a fox"]})
    write_record(folder / "other_model.png", record | {"command": ["--model=./gone", "--", "a fox"]})
    write_record(folder / "other_input.png", record | {"command": ["--image=cat.png", "--", "a fox"]})
    return folder


@pytest.fixture(scope="module")
def port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield str(server.getsockname()[1])


def test_the_table_is_read_whole():
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    assert len(ROWS) == sum(line.startswith("|") for line in lines) - 2 * lines.count("|---|---|---|")
    assert len(ROWS) >= 120
    assert len({command for command, _, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("command", "code", "message"), ROWS, ids=[row[0].replace(" ", "_") or "nothing" for row in ROWS]
)
def test_bad_inputs(command, code, message, folder, port, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("pipelines", "chat", "quantize", "demo"):
        monkeypatch.setattr(f"diffusers_sana.cli.{name}.load_on", None)
    before = sorted(folder.rglob("*"))
    for name, value in (REPLACED | {"PORT": port}).items():
        command = command.replace(name, value)
    ended = run(*shlex.split(command))
    assert message in ended.error
    assert ended.code == int(code)
    assert ended.out == ""
    assert ended.error.startswith("diffusers-sana")
    assert len(ended.error.splitlines()) == 1, "one line"
    assert len(ended.error) < 800
    assert sorted(folder.rglob("*")) == before
