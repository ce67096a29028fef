"""A cache of compiled kernels is found by another process, packed, and no larger than it may be."""

import tarfile

import pytest

from benchmarks import warm_cache


NAMES = ["guided_solver_step"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    file = tmp_path_factory.mktemp("cache") / "new" / "triton.tar.xz"
    return file, warm_cache.make(file, "sm_90", NAMES)


def test_a_second_process_finds_everything(made):
    file, count = made
    with tarfile.open(file) as archive:
        names = [member.name for member in archive.getmembers()]
    assert {name.rpartition(".")[2] for name in names} == {"json", "cubin"}
    assert count == len({name.partition("/")[0] for name in names}) > 0


def test_what_is_missing_is_compiled_again_and_an_error(made, tmp_path, monkeypatch):
    """As after another version of Triton has made it."""

    def stale(folder, architecture, names):
        (folder / f"entry{len(list(folder.iterdir()))}").mkdir()

    monkeypatch.setattr(warm_cache, "fill", stale)
    with pytest.raises(RuntimeError, match="A second process compiled 1 of 0 entries again"):
        warm_cache.make(tmp_path / "triton.tar.xz", "sm_90", NAMES)


def test_size_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_cache, "LIMIT_MIB", 0)
    monkeypatch.setattr(warm_cache, "fill", lambda folder, architecture, names: None)
    with pytest.raises(RuntimeError, match="at most 0 MiB"):
        warm_cache.make(tmp_path / "triton.tar.xz", "sm_90", NAMES)
