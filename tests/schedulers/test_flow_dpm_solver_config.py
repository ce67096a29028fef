"""What `FlowDPMSolverScheduler` loads, saves, and refuses to load."""

import json
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging

from diffusers_sana import FlowDPMSolverScheduler
from tests.numerics import assert_close_fp32


# The scheduler_config.json of the official repositories.
OFFICIAL = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.32.0.dev0",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lambda_min_clipped": float("-inf"),
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
    "variance_type": None,
}


@pytest.fixture
def warnings(monkeypatch):
    """What diffusers logs about config files."""
    found = []
    logger = logging.get_logger("diffusers.configuration_utils")
    monkeypatch.setattr(logger, "warning", lambda message, *args: found.append(message))
    return found


def sample_20_steps(scheduler):
    scheduler.set_timesteps(20)
    sample = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.sin(sample + timestep / 1000), timestep, sample).prev_sample
    return sample


def write(folder, config):
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def test_from_pretrained_official_config(tmp_path, warnings):
    folder = write(tmp_path, OFFICIAL)
    ours = FlowDPMSolverScheduler.from_pretrained(folder)
    assert ours.config.flow_shift == 3.0
    assert_close_fp32(sample_20_steps(ours), sample_20_steps(DPMSolverMultistepScheduler.from_pretrained(folder)))
    assert FlowDPMSolverScheduler.from_pretrained(folder, flow_shift=6.0).config.flow_shift == 6.0
    assert warnings == []


@pytest.mark.parametrize("is_from_official", [True, False])
def test_save_pretrained_is_read_by_diffusers(tmp_path, warnings, is_from_official):
    if is_from_official:
        ours = FlowDPMSolverScheduler.from_config(OFFICIAL, solver_order=3, final_sigmas_type="sigma_min")
    else:
        ours = FlowDPMSolverScheduler(flow_shift=3.0, solver_type="heun")
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "FlowDPMSolverScheduler"
    if is_from_official:  # nothing of the official config is lost
        assert saved.keys() >= OFFICIAL.keys()

    theirs = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert theirs.config.use_flow_sigmas is True
    assert theirs.config.prediction_type == "flow_prediction"
    again = FlowDPMSolverScheduler.from_pretrained(tmp_path)
    assert again.config == ours.config
    expected = sample_20_steps(ours)
    assert torch.equal(sample_20_steps(again), expected)
    assert_close_fp32(sample_20_steps(theirs), expected)
    assert warnings == []


def test_from_config_there_and_back_in_memory(warnings):
    """Also for a scheduler built from defaults, which differ between the classes."""
    ours = FlowDPMSolverScheduler()
    theirs = DPMSolverMultistepScheduler.from_config(ours.config)
    assert_close_fp32(sample_20_steps(theirs), sample_20_steps(ours))
    back = FlowDPMSolverScheduler.from_config(theirs.config)
    assert torch.equal(sample_20_steps(back), sample_20_steps(ours))
    assert warnings == []


def test_from_config_unipc(warnings):
    unipc = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=3
    )
    ours = FlowDPMSolverScheduler.from_config(unipc.config)
    assert (ours.config.flow_shift, ours.config.solver_order, ours.config.solver_type) == (3.0, 3, "midpoint")
    back = UniPCMultistepScheduler.from_config(ours.config)
    assert torch.equal(sample_20_steps(back), sample_20_steps(unipc))
    assert warnings == []


def test_from_config_flow_match_euler():
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = FlowDPMSolverScheduler.from_config(euler.config)
    assert torch.equal(sample_20_steps(ours), sample_20_steps(FlowDPMSolverScheduler(flow_shift=3.0)))
    back = FlowMatchEulerDiscreteScheduler.from_config(ours.config, shift=ours.config.flow_shift)
    assert torch.equal(sample_20_steps(back), sample_20_steps(euler))
    assert FlowDPMSolverScheduler.from_config(euler.config, flow_shift=6.0).config.flow_shift == 6.0


def test_compatibles():
    compatibles = FlowDPMSolverScheduler().compatibles
    assert {DPMSolverMultistepScheduler, UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler} == set(compatibles)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("algorithm_type", "dpmsolver"),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("final_sigmas_type", "one"),
        ("prediction_type", "epsilon"),
        ("rescale_betas_zero_snr", True),
        ("shift_terminal", 0.02),
        ("solver_order", 4),
        ("solver_type", "logrho"),
        ("thresholding", True),
        ("trained_betas", [0.1, 0.2]),
        ("use_beta_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_flow_sigmas", False),
        ("use_karras_sigmas", True),
        ("use_lu_lambdas", True),
    ],
)
def test_from_config_refuses(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        FlowDPMSolverScheduler.from_config({**OFFICIAL, name: value})


def test_from_config_refuses_what_only_was_a_default_elsewhere():
    for scheduler in (DPMSolverMultistepScheduler(), DDIMScheduler()):
        with pytest.raises(ValueError, match="`prediction_type` must be 'flow_prediction'"):
            FlowDPMSolverScheduler.from_config(scheduler.config)


def test_from_config_overrides_before_it_refuses():
    scheduler = FlowDPMSolverScheduler.from_config({**OFFICIAL, "use_karras_sigmas": True}, use_karras_sigmas=False)
    assert scheduler.config.use_karras_sigmas is False


def test_init_refuses():
    with pytest.raises(ValueError, match="`flow_shift` must be above 0, got 0"):
        FlowDPMSolverScheduler(flow_shift=0)
    with pytest.raises(ValueError, match="`time_shift_type` must be 'exponential'"):
        FlowDPMSolverScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    with pytest.raises(ValueError, match=r"`solver_order` must be 1 or 2 with `algorithm_type='sde-dpmsolver\+\+'`"):
        FlowDPMSolverScheduler(algorithm_type="sde-dpmsolver++", solver_order=3)
    with pytest.raises(TypeError, match="`config` must be a dict"):
        FlowDPMSolverScheduler.from_config("some/repository")


def test_diffusers_refuses_adams_bashforth(tmp_path):
    """It must not sample with another algorithm in silence."""
    scheduler = FlowDPMSolverScheduler.from_config(OFFICIAL, algorithm_type="adams_bashforth")
    scheduler.save_pretrained(tmp_path)
    assert FlowDPMSolverScheduler.from_pretrained(tmp_path).config.algorithm_type == "adams_bashforth"
    with pytest.raises(NotImplementedError, match="adams_bashforth"):
        DPMSolverMultistepScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("num_train_timesteps", 0, ValueError, "must be at least 1, got 0"),
        ("num_train_timesteps", "1000", TypeError, "must be an integer, got '1000'"),
        ("num_train_timesteps", 1000.0, TypeError, "must be an integer"),
        ("num_train_timesteps", 2**63, ValueError, "must be at most"),
        ("solver_order", 2.0, TypeError, "must be an integer"),
        ("solver_order", True, TypeError, "must be an integer"),
        ("flow_shift", math.nan, ValueError, "must be finite, got nan"),
        ("flow_shift", math.inf, ValueError, "must be finite"),
        ("flow_shift", -1, ValueError, "must be above 0"),
        ("flow_shift", 1e9, ValueError, "must be at most 1000"),
        ("flow_shift", "3.0", TypeError, "must be a number, got '3.0'"),
        ("flow_shift", None, TypeError, "must be a number"),
        ("beta_start", math.nan, ValueError, "must be finite"),
        ("beta_start", 0, ValueError, "must be above 0"),
        ("use_dynamic_shifting", "no", TypeError, "must be True or False, got 'no'"),
        ("use_dynamic_shifting", None, TypeError, "must be True or False"),
        ("lower_order_final", 1, TypeError, "must be True or False"),
        ("euler_at_final", [], TypeError, "must be True or False"),
    ],
)
def test_values_that_cannot_be_meant(field, value, error, message):
    with pytest.raises(error, match=f"`{field}` {message}"):
        FlowDPMSolverScheduler.from_config({**OFFICIAL, field: value})


@pytest.mark.parametrize("mu", [math.nan, math.inf, 1000.0, -1000.0])
def test_shifts_that_cannot_be_meant(mu):
    scheduler = FlowDPMSolverScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="`mu` must be"):
        scheduler.set_timesteps(4, mu=mu)


def test_levels_that_are_equal():
    scheduler = FlowDPMSolverScheduler(flow_shift=1000.0, num_train_timesteps=100_000)
    with pytest.raises(ValueError, match="noise levels with a shift of 1000 must differ in fp32"):
        scheduler.set_timesteps(20_000)
    with pytest.raises(ValueError, match="`num_inference_steps` must be at most 100000"):
        scheduler.set_timesteps(2_000_000_000)
    FlowDPMSolverScheduler(flow_shift=12.0).set_timesteps(1500)
