"""The fuzzer of files: it sees what it is to see, and a few of its cases end well."""

import os
import random
import signal
import time

import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin

from benchmarks import fuzz
from diffusers_sana.models.loading import StrictModelMixin


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with fuzz.quiet():
        fuzz.write_pipeline(folder)
    return folder


@pytest.fixture(autouse=True)
def quiet():
    with fuzz.quiet():
        yield


def test_a_few_cases():
    report = fuzz.fuzz(4, 7, list(fuzz.KINDS))
    assert report["failed"] == []
    assert report["counts"].keys() == fuzz.KINDS.keys()
    assert all(sum(counts.values()) == 4 for counts in report["counts"].values())
    assert sum(counts["refused"] for counts in report["counts"].values()) > 4


def test_cases_are_those_of_their_seed():
    content = fuzz.json.dumps(fuzz.CONFIG).encode()
    files = [[fuzz.change_json(content, random.Random(f"{seed} {n}")) for n in range(20)] for seed in (0, 0, 1)]
    assert files[0] == files[1] != files[2]
    assert sum(file != content for file in files[0]) > 15


class TestOutcomes:
    def test_same_and_other(self, source):
        folder = source / "whole"
        image = fuzz.use(folder, "config")
        assert fuzz.outcome(folder, "config", folder / fuzz.KINDS["config"], image) == ("same", "")
        assert fuzz.outcome(folder, "config", folder / fuzz.KINDS["config"], image + 1) == ("other", "")
        assert fuzz.use(folder, "lora").sub(image).abs().max() > 0.1  # or a broken LoRA could not be told

    def test_weights_that_are_not_read(self, source, tmp_path, monkeypatch):
        """As it was before `from_pretrained` was strict."""
        folder = fuzz.shutil.copytree(source / "whole", tmp_path / "pipeline")
        file = folder / fuzz.KINDS["header"]
        file.write_bytes(file.read_bytes().replace(b'"proj_out.bias"', b'"proj_out.bixs"'))
        image = fuzz.use(source / "whole", "header")
        assert fuzz.outcome(folder, "header", file, image)[0] == "refused"
        monkeypatch.setattr(StrictModelMixin, "from_pretrained", classmethod(ModelMixin.from_pretrained.__func__))
        assert fuzz.outcome(folder, "header", file, image)[0] in fuzz.BAD

    def test_error_without_the_name(self, source, monkeypatch):
        def fail(*args, **kwargs):
            raise ValueError("something is wrong")

        monkeypatch.setattr(fuzz.SanaPipeline, "from_pretrained", fail)
        image = torch.zeros(1)
        assert fuzz.outcome(source, "config", source / "config.json", image)[0] == "unnamed"

    def test_not_finite(self, source, monkeypatch):
        image = fuzz.use(source / "whole", "config")
        monkeypatch.setattr(fuzz, "use", lambda *args: image * torch.nan)
        assert fuzz.outcome(source, "config", source / "config.json", image)[0] == "not finite"


class TestChild:
    def test_crash(self):
        assert fuzz.in_a_child(lambda: os.kill(os.getpid(), signal.SIGKILL))[0] == "crash"

    def test_hang(self, monkeypatch):
        monkeypatch.setattr(fuzz, "SECONDS", 0.2)
        assert fuzz.in_a_child(lambda: time.sleep(60))[0] == "hang"

    def test_memory(self):
        what, message = fuzz.in_a_child(lambda: ("same", str(len(bytearray(2 * fuzz.MEMORY)))))
        assert what == "late"
        assert "MemoryError" in message

    def test_answer(self):
        assert fuzz.in_a_child(lambda: ("refused", "é")) == ("refused", "é")
