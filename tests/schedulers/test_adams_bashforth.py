"""`algorithm_type="adams_bashforth"`, and the study that speaks for it."""

import json

import pytest
import torch

from benchmarks import study_flow_solvers as study
from diffusers_sana.schedulers.scheduling_flow_dpm_solver import FlowDPMSolverScheduler


SIGMAS = [0.95, 0.8, 0.7, 0.5, 0.35, 0.3, 0.1]  # unequal steps


def adams_bashforth(solver_order, **options):
    return FlowDPMSolverScheduler(algorithm_type="adams_bashforth", solver_order=solver_order, **options)


def integrate(scheduler, derivative, integral):
    """Runs on `v = derivative(σ)` with a start that needs no lower orders; the error at σ = 0."""
    scheduler.set_timesteps(sigmas=SIGMAS)
    levels = scheduler.sigmas.double().tolist()
    start = scheduler.config.solver_order - 1
    for index, sigma in enumerate(levels[:-1]):
        if index <= start:  # until the history is full, the sample is the exact one
            sample = torch.tensor([integral(sigma)], dtype=torch.float64)
        velocity = torch.tensor([derivative(sigma)], dtype=torch.float64)
        sample = scheduler.step(velocity, scheduler.timesteps[index], sample).prev_sample
    return abs(sample.item() - integral(0.0))


@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_is_exact_for_polynomials_up_to_its_order(solver_order):
    for degree in range(4):
        error = integrate(
            adams_bashforth(solver_order, lower_order_final=False),
            lambda sigma, degree=degree: (degree + 1) * sigma**degree,
            lambda sigma, degree=degree: sigma ** (degree + 1),
        )
        assert error < 1e-12 if degree < solver_order else error > 1e-4, (degree, error)


@pytest.mark.parametrize(
    "options", [{"lower_order_final": True}, {"lower_order_final": False, "euler_at_final": True}]
)
def test_final_options_make_the_last_step_first_order(options):
    scheduler = adams_bashforth(2, **options)
    scheduler.set_timesteps(sigmas=SIGMAS)
    for timestep in scheduler.timesteps[:-1]:
        sample = scheduler.step(torch.randn(3), timestep, torch.randn(3)).prev_sample
    velocity = torch.randn(3)
    last = scheduler.step(velocity, scheduler.timesteps[-1], sample).prev_sample
    torch.testing.assert_close(last, sample - SIGMAS[-1] * velocity)


def test_order_1_equals_dpm_solver():
    outputs = []
    for algorithm_type in ("adams_bashforth", "dpmsolver++"):
        scheduler = FlowDPMSolverScheduler(algorithm_type=algorithm_type, solver_order=1, flow_shift=3.0)
        scheduler.set_timesteps(10)
        sample = torch.linspace(-1, 1, 12, dtype=torch.float64)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(sample.sin(), timestep, sample).prev_sample
        outputs.append(sample)
    torch.testing.assert_close(*outputs)


def test_velocity_of_the_study_is_the_conditional_mean():
    """Against the average over many samples of the data, weighted by how likely each explains `x`."""
    flow, _ = study.make_flow("wide", seed=0)
    flow.means, flow.variances = flow.means[:3, :2], flow.variances[:3, :2]
    sigma, x = 0.6, torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    component = torch.randint(3, (200_000,))
    data = flow.means[component] + flow.variances[component].sqrt() * torch.randn(200_000, 2, dtype=torch.float64)
    weights = (-((x - (1 - sigma) * data) ** 2).sum(-1) / (2 * sigma**2)).softmax(0)
    expected = (x - weights @ data) / sigma
    torch.testing.assert_close(flow.velocity(x, sigma), expected, atol=0.02, rtol=0)


def test_half_end_and_adams_bashforth_beat_the_recipe(monkeypatch):
    """One small case of the study, so that the claim of the documentation stays tied to the code."""
    monkeypatch.setattr(study, "NUM_SAMPLES", 64)
    flow, noise = study.make_flow("spectrum", seed=7)
    reference = study.integrate(flow, noise, 100)
    error = {
        name: study.relative_error(study.sample(flow, study.SOLVERS[name].prepared(20), noise), reference)
        for name in (study.BASELINE, "Adams-Bashforth 2", "Adams-Bashforth 2, half end", "DPM-Solver++ 2, half end")
    }
    baseline = error.pop(study.BASELINE)
    assert all(value < 0.9 * baseline for value in error.values()), (baseline, error)
    assert error["Adams-Bashforth 2, half end"] < 0.65 * baseline


def test_documented_tables_are_the_measured_ones():
    result = json.loads(study.RESULT.read_text())
    assert {row["solver"] for row in result["rows"]} == set(study.SOLVERS)
    page = study.PAGE.read_text()
    assert page.split(study.BEGIN)[1].split(study.END)[0].strip() == study.markdown(result).strip()
    assert study.FIGURE.is_file()
