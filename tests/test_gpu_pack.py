import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_sana.checkpoints import SANA_EMOJI
from tools import gpu_pack


WHEELS_AND_CACHE_MIB = 20  # transformers and diffusers, 19 MiB


def test_pack(tmp_path: Path, capsys: pytest.CaptureFixture):
    wheel = tmp_path / "some.whl"
    wheel.write_bytes(bytes(2**20))
    gpu_pack.main([str(tmp_path / "pack"), "--add", str(wheel)])
    printed = capsys.readouterr().out
    assert "added some.whl: 1.0 MiB" in printed
    assert gpu_pack.mib(tmp_path / "pack") < gpu_pack.LIMIT_MIB - WHEELS_AND_CACHE_MIB
    assert (tmp_path / "pack" / "added" / "some.whl").exists()
    model = Path(SANA_EMOJI).relative_to(gpu_pack.ROOT)
    for file in Path(SANA_EMOJI).rglob("*.safetensors"):
        assert (tmp_path / "pack" / model / file.relative_to(SANA_EMOJI)).stat().st_size == file.stat().st_size
    # The packed code runs by itself, and its results name the commit without git.
    code = "import benchmarks.harness as h; print(h.__file__); print(h.commit())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "pack",
        env={"PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    file, commit = run.stdout.split()
    assert Path(file).is_relative_to(tmp_path / "pack")
    assert commit == (tmp_path / "pack" / "COMMIT").read_text().strip() != ""


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_pack, "LIMIT_MIB", 1)
    with pytest.raises(SystemExit, match="at most 1 MiB"):
        gpu_pack.main([str(tmp_path / "pack")])


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        gpu_pack.main([str(tmp_path)])
    assert "`folder` must be new" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_pack.main([str(tmp_path / "pack"), "--add", str(tmp_path / "missing.whl")])
    assert "missing.whl" in capsys.readouterr().err
