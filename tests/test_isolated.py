import time
from pathlib import Path

import pytest

from benchmarks.isolated import run_isolated
from tests import isolated_cases


def is_asleep(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"sleep")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_bad_case_costs_only_itself(tmp_path, monkeypatch):
    child = tmp_path / "child"
    monkeypatch.setenv("CHILD", str(child))
    outcomes = {name: (state, value) for name, state, value in run_isolated(isolated_cases.cases, 600, 3)}
    assert [state for state, _ in outcomes.values()] == ["done", "failed", "failed", "failed", "done"]
    assert outcomes["raises"][1] == "KernelError: out of shared memory"
    assert "exit code 11" in outcomes["dies"][1]
    assert "longer than 3 s" in outcomes["hangs"][1]
    assert outcomes["good again"][1] != outcomes["good"][1]  # a new process
    for _ in range(100):  # the child has ended with the case that hung
        if not is_asleep(child.read_text()):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of a case that was ended goes on")


def test_a_case_does_not_outlast_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    start = time.monotonic()
    outcomes = {name: value for name, _, value in run_isolated(isolated_cases.cases, 3, 600)}
    assert time.monotonic() - start < 60
    assert "took longer than" in outcomes["hangs"]
    assert outcomes["good again"] == "the time of 3 s is over"


def test_no_case_begins_when_the_time_is_over():
    outcomes = list(run_isolated(isolated_cases.cases, -1, 10))
    assert {state for _, state, _ in outcomes} == {"not run"}
    assert len(outcomes) == 5


def test_cases_that_cannot_be_listed():
    with pytest.raises(RuntimeError, match="could not list the cases: ImportError: no module named 'skimage'"):
        list(run_isolated(isolated_cases.unlistable, 10, 10))
