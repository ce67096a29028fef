import pytest

from benchmarks.isolated import run_isolated
from tests import isolated_cases


def test_a_bad_case_costs_only_itself():
    outcomes = {name: (state, value) for name, state, value in run_isolated(isolated_cases.cases, 600, 10)}
    assert [state for state, _ in outcomes.values()] == ["done", "failed", "failed", "failed", "done"]
    assert outcomes["raises"][1] == "KernelError: out of shared memory"
    assert "exit code 11" in outcomes["dies"][1]
    assert "longer than 10 s" in outcomes["hangs"][1]
    assert outcomes["good again"][1] != outcomes["good"][1]  # a new process


def test_no_case_begins_when_the_time_is_over():
    outcomes = list(run_isolated(isolated_cases.cases, -1, 10))
    assert {state for _, state, _ in outcomes} == {"not run"}
    assert len(outcomes) == 5


def test_cases_that_cannot_be_listed():
    with pytest.raises(RuntimeError, match="could not list the cases: ImportError: no module named 'skimage'"):
        list(run_isolated(isolated_cases.unlistable, 10, 10))
