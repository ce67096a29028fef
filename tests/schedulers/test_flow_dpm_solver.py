"""`FlowDPMSolverScheduler` against `DPMSolverMultistepScheduler` of diffusers, and its own contract.

Legend: n steps. The model below is cheap, non-linear in the sample and depends on the timestep.
"""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_sana.schedulers.scheduling_flow_dpm_solver import FlowDPMSolverScheduler
from tests.numerics import assert_close_fp32, assert_no_worse


NUM_STEPS = (1, 2, 3, 4, 10, 14, 15, 20)


def model(sample, timestep):
    level = float(timestep) / 1000
    return torch.tanh(1.3 * sample) * (1 - level) + level * sample.flip(1)


def latents(dtype=torch.float32, seed=0):
    return torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stock(**options):
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **options)


def run(scheduler, sample, timesteps=None, **step_options):
    for timestep in scheduler.timesteps if timesteps is None else timesteps:
        sample = scheduler.step(model(sample, timestep), timestep, sample, **step_options).prev_sample
    return sample


SOLVERS = [
    ("dpmsolver++", 1, "midpoint"),
    ("dpmsolver++", 2, "midpoint"),
    ("dpmsolver++", 2, "heun"),
    ("dpmsolver++", 3, "midpoint"),
    ("dpmsolver++", 3, "heun"),
    ("sde-dpmsolver++", 1, "midpoint"),
    ("sde-dpmsolver++", 2, "midpoint"),
    ("sde-dpmsolver++", 2, "heun"),
]


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize(("algorithm_type", "solver_order", "solver_type"), SOLVERS)
def test_equals_diffusers(algorithm_type, solver_order, solver_type, final_sigmas_type):
    for num_steps, lower_order_final, euler_at_final in itertools.product(NUM_STEPS, (True, False), (True, False)):
        options = {
            "algorithm_type": algorithm_type,
            "solver_order": solver_order,
            "solver_type": solver_type,
            "final_sigmas_type": final_sigmas_type,
            "lower_order_final": lower_order_final,
            "euler_at_final": euler_at_final,
            "flow_shift": 3.0,
        }
        ours, theirs = FlowDPMSolverScheduler(**options), stock(**options)
        ours.set_timesteps(num_steps)
        theirs.set_timesteps(num_steps)
        # What is left is fp32: diffusers computes the scalars of a step in it.
        actual, expected = (
            run(scheduler, latents(), generator=torch.Generator().manual_seed(1)) for scheduler in (ours, theirs)
        )
        assert_close_fp32(actual, expected)


@pytest.mark.parametrize("num_train_timesteps", [25, 999, 1000])
@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 6.0])
def test_set_timesteps_equals_diffusers_for_every_number_of_steps(flow_shift, num_train_timesteps):
    options = {"flow_shift": flow_shift, "num_train_timesteps": num_train_timesteps}
    ours, theirs = FlowDPMSolverScheduler(**options), stock(**options)
    for num_steps in range(1, 130, 3):
        ours.set_timesteps(num_steps)
        theirs.set_timesteps(num_steps)
        assert ours.timesteps.dtype == theirs.timesteps.dtype
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert torch.equal(ours.sigmas, theirs.sigmas)


def test_set_timesteps_sana_recipe():
    scheduler = FlowDPMSolverScheduler(flow_shift=3.0)
    scheduler.set_timesteps(14)
    assert scheduler.timesteps.tolist() == [999, 974, 947, 916, 881, 843, 799, 749, 691, 624, 545, 449, 333, 187]
    assert len(scheduler) == 1000
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == 1
    sample = latents()
    assert scheduler.scale_model_input(sample, 999) is sample


@pytest.mark.parametrize("timestep_spacing", ["linspace", "leading", "trailing"])
def test_timestep_spacing_has_no_effect_as_in_diffusers(timestep_spacing):
    theirs = stock(flow_shift=3.0, timestep_spacing=timestep_spacing, steps_offset=1)
    ours = FlowDPMSolverScheduler.from_config(theirs.config)
    theirs.set_timesteps(20)
    ours.set_timesteps(20)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.config.timestep_spacing == timestep_spacing


def test_dynamic_shifting_equals_diffusers():
    ours, theirs = FlowDPMSolverScheduler(use_dynamic_shifting=True), stock(use_dynamic_shifting=True)
    ours.set_timesteps(20, mu=1.2)
    theirs.set_timesteps(20, mu=1.2)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert_close_fp32(run(ours, latents()), run(theirs, latents()))


def test_first_order_is_euler_and_last_step_is_the_data_prediction():
    scheduler = FlowDPMSolverScheduler(flow_shift=3.0)
    scheduler.set_timesteps(20)
    sample, velocity = latents(), latents(seed=1)
    sigma, target = scheduler.sigmas[:2].tolist()
    first = scheduler.step(velocity, scheduler.timesteps[0], sample).prev_sample
    assert_close_fp32(first, sample + (target - sigma) * velocity, tolerance=1e-6)

    scheduler.set_timesteps(20)
    for timestep in scheduler.timesteps[:-1]:
        sample = scheduler.step(model(sample, timestep), timestep, sample).prev_sample
    last = scheduler.step(velocity, scheduler.timesteps[-1], sample, return_dict=False)[0]
    assert_close_fp32(last, sample - scheduler.sigmas[-2].item() * velocity, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_step_in_half_precision_is_no_worse_than_diffusers(dtype):
    outputs = []
    for scheduler in (FlowDPMSolverScheduler(flow_shift=3.0), stock(flow_shift=3.0)):
        scheduler.set_timesteps(20)
        outputs.append(run(scheduler, latents(dtype)))
    reference = FlowDPMSolverScheduler(flow_shift=3.0)
    reference.set_timesteps(20)
    reference = run(reference, latents(dtype).double())
    assert outputs[0].dtype == outputs[1].dtype == dtype
    assert reference.dtype == torch.float64
    assert_no_worse(outputs[0], outputs[1], reference)


def test_step_of_half_velocity_and_fp32_sample_gives_fp32_as_diffusers():
    for scheduler in (FlowDPMSolverScheduler(), stock()):
        scheduler.set_timesteps(4)
        output = scheduler.step(latents(torch.float16), scheduler.timesteps[0], latents()).prev_sample
        assert output.dtype == torch.float32


@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "sde-dpmsolver++", "adams_bashforth"])
def test_step_leaves_its_inputs_and_does_not_depend_on_them_afterwards(algorithm_type):
    scheduler = FlowDPMSolverScheduler(flow_shift=3.0, algorithm_type=algorithm_type)
    results = []
    for overwrites in (False, True):
        scheduler.set_timesteps(6)
        generator = torch.Generator().manual_seed(1)
        sample = latents()
        for timestep in scheduler.timesteps:
            velocity = model(sample, timestep)
            kept = velocity.clone(), sample.clone()
            next_sample = scheduler.step(velocity, timestep, sample, generator=generator).prev_sample
            assert torch.equal(velocity, kept[0])
            assert torch.equal(sample, kept[1])
            if overwrites:  # as a compiled model does with its output
                velocity.fill_(torch.nan)
                sample.fill_(torch.nan)
            sample = next_sample
        results.append(sample)
    assert torch.equal(*results)


def test_sde_noise_can_be_given():
    scheduler = FlowDPMSolverScheduler(flow_shift=3.0, algorithm_type="sde-dpmsolver++")
    noise = torch.randn(latents().shape, generator=torch.Generator().manual_seed(5))
    outputs = []
    for options in ({"generator": torch.Generator().manual_seed(5)}, {"variance_noise": noise}):
        scheduler.set_timesteps(4)
        outputs.append(scheduler.step(latents(seed=1), scheduler.timesteps[0], latents(), **options).prev_sample)
    assert torch.equal(*outputs)


def test_custom_timesteps():
    built_in, custom = FlowDPMSolverScheduler(flow_shift=3.0), FlowDPMSolverScheduler(flow_shift=3.0)
    built_in.set_timesteps(20)
    custom.set_timesteps(timesteps=built_in.timesteps.tolist())
    assert torch.equal(custom.timesteps, built_in.timesteps)
    assert custom.num_inference_steps == 20
    # They were truncated: less than one timestep apart.
    assert 0 < (custom.sigmas - built_in.sigmas).abs().max() < 1e-3
    assert_close_fp32(run(custom, latents()), run(built_in, latents()), tolerance=2e-3)

    custom.set_timesteps(timesteps=(built_in.sigmas[:-1].double() * 1000).tolist())
    assert torch.equal(custom.sigmas, built_in.sigmas)


def test_custom_sigmas_are_shifted():
    built_in, custom = FlowDPMSolverScheduler(flow_shift=3.0), FlowDPMSolverScheduler(flow_shift=3.0)
    built_in.set_timesteps(20)
    custom.set_timesteps(sigmas=np.linspace(0.999, 0.999 / 20, 20))
    torch.testing.assert_close(custom.sigmas, built_in.sigmas, atol=1e-7, rtol=0)
    assert_close_fp32(run(custom, latents(), built_in.timesteps), run(built_in, latents()))


@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "sde-dpmsolver++"])
def test_sigmas_may_begin_with_1(algorithm_type):
    """The log-SNR there is minus infinity, so the first prediction is infinitely far and must get no weight."""
    difference = {}
    for first in (1.0, 0.99):
        outputs = []
        for solver_order in (1, 2):
            scheduler = FlowDPMSolverScheduler(algorithm_type=algorithm_type, solver_order=solver_order)
            scheduler.set_timesteps(sigmas=[first, 0.8, 0.6, 0.4])
            generator = torch.Generator().manual_seed(1)
            outputs.append(run(scheduler, latents(), scheduler.timesteps[:2], generator=generator))
        assert outputs[0].isfinite().all()
        difference[first] = (outputs[0] - outputs[1]).abs().max()
    assert difference[1.0] == 0 < difference[0.99]


@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "adams_bashforth"])
def test_sigmas_may_begin_with_1_at_order_3(algorithm_type):
    scheduler = FlowDPMSolverScheduler(algorithm_type=algorithm_type, solver_order=3, lower_order_final=False)
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    assert run(scheduler, latents()).isfinite().all()


@pytest.mark.parametrize("begin", [0, 7, 19])
def test_begin_index_equals_diffusers(begin):
    outputs = []
    for scheduler in (FlowDPMSolverScheduler(flow_shift=3.0), stock(flow_shift=3.0)):
        scheduler.set_timesteps(20)
        scheduler.set_begin_index(begin)
        assert scheduler.begin_index == begin
        timesteps = scheduler.timesteps[begin:]
        noisy = scheduler.add_noise(latents(), latents(seed=1), timesteps[:1].repeat(2))
        outputs.append(run(scheduler, noisy, timesteps))
        assert scheduler.step_index == 20
    assert_close_fp32(*outputs)


@pytest.mark.parametrize("kind", ["view", "int", "float", "copy", "batch"])
def test_first_timestep_tells_where_to_begin(kind):
    def convert(timestep):
        return {
            "view": timestep,
            "int": int(timestep),
            "float": float(timestep),
            "copy": timestep.clone(),
            "batch": timestep.expand(2),
        }[kind]

    scheduler = FlowDPMSolverScheduler(flow_shift=3.0)
    scheduler.set_timesteps(20)
    for timestep in scheduler.timesteps[5:]:
        sample = scheduler.step(latents(seed=1), convert(timestep), latents()).prev_sample
    assert scheduler.step_index == 20
    assert sample.isfinite().all()


def test_set_timesteps_starts_a_new_run():
    scheduler = FlowDPMSolverScheduler(flow_shift=3.0, solver_order=3)
    scheduler.set_timesteps(8)
    first = run(scheduler, latents())
    scheduler.set_begin_index(3)
    scheduler.set_timesteps(8)
    assert scheduler.begin_index is None
    assert scheduler.step_index is None
    assert torch.equal(run(scheduler, latents()), first)


def test_a_run_with_duplicated_timesteps_takes_every_step():
    scheduler = FlowDPMSolverScheduler(flow_shift=3.0)
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    sample = latents()
    for timestep in scheduler.timesteps.tolist():
        sample = scheduler.step(sample, timestep, sample).prev_sample
    assert scheduler.step_index == 1000


class RefuseReading(TorchDispatchMode):
    """Fails on every operation that makes the host wait for a value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(
            name in str(function) for name in ("_local_scalar_dense", "nonzero", "equal.default", "is_nonzero")
        ), f"{function} reads a tensor"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "adams_bashforth", "sde-dpmsolver++"])
def test_step_never_reads_a_tensor(algorithm_type):
    scheduler = FlowDPMSolverScheduler(flow_shift=3.0, algorithm_type=algorithm_type)
    scheduler.set_timesteps(6)
    sample, velocity = latents(), latents(seed=1)
    timesteps = scheduler.timesteps[2:]
    with RefuseReading():
        for timestep in timesteps:
            sample = scheduler.step(velocity, timestep, sample).prev_sample
    assert scheduler.step_index == 6
    with pytest.raises(AssertionError, match="reads a tensor"), RefuseReading():
        bool(sample.sum() > 0)

    # Tensors on `meta` have no values that could be read.
    scheduler.set_timesteps(6, device="meta")
    sample = torch.empty(2, 4, device="meta")
    for timestep in scheduler.timesteps:
        sample = scheduler.step(sample, timestep, sample).prev_sample
    assert scheduler.step_index == 6


def test_add_noise_equals_diffusers():
    ours, theirs = FlowDPMSolverScheduler(flow_shift=3.0), stock(flow_shift=3.0)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
    timesteps = ours.timesteps[[3, 17]]
    noisy = ours.add_noise(latents(), latents(seed=1), timesteps)
    assert_close_fp32(noisy, theirs.add_noise(latents(), latents(seed=1), timesteps), tolerance=1e-6)
    assert torch.equal(noisy, ours.scale_noise(latents(), timesteps, latents(seed=1)))
    assert ours.add_noise(latents(torch.float16), latents(torch.float16), timesteps).dtype == torch.float16

    # After the first step the level of the run counts, whatever the timestep: inpainting.
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(4)
        scheduler.step(latents(), scheduler.timesteps[4], latents())
    noisy = ours.add_noise(latents(), latents(seed=1), timesteps)
    assert_close_fp32(noisy, theirs.add_noise(latents(), latents(seed=1), timesteps), tolerance=1e-6)


def test_add_noise_and_the_true_velocity_give_the_sample_back():
    scheduler = FlowDPMSolverScheduler(flow_shift=3.0)
    scheduler.set_timesteps(20)
    clean, noise = latents(), latents(seed=1)
    timesteps = scheduler.timesteps[8:]
    sample = scheduler.add_noise(clean, noise, timesteps[:1])
    for timestep in timesteps:
        sample = scheduler.step(noise - clean, timestep, sample).prev_sample
    assert_close_fp32(sample, clean)


def test_add_noise_before_set_timesteps_knows_every_training_timestep():
    scheduler = FlowDPMSolverScheduler()
    noisy = scheduler.add_noise(torch.zeros(3, 1), torch.ones(3, 1), torch.tensor([10, 500, 990]))
    torch.testing.assert_close(noisy[:, 0], torch.tensor([0.01, 0.5, 0.99]), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got none"),
        ({"num_inference_steps": 2, "sigmas": [0.5]}, "`timesteps` and `sigmas` must be given"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1"),
        ({"num_inference_steps": 4, "mu": 1.0}, "`mu` must be None"),
        ({"sigmas": [0.5, 0.0]}, "`sigmas` must be .* final 0"),
        ({"sigmas": [1.5, 0.5]}, "`sigmas` must be"),
        ({"sigmas": [0.5, 0.6]}, "`sigmas` must be"),
        ({"timesteps": []}, "`timesteps` must be"),
        ({"timesteps": [1001, 5]}, r"within \(0, 1000\]"),
    ],
)
def test_set_timesteps_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        FlowDPMSolverScheduler().set_timesteps(**options)


def test_set_timesteps_refuses_a_grid_that_ends_below_the_final_sigma():
    with pytest.raises(ValueError, match="above the final one"):
        FlowDPMSolverScheduler(final_sigmas_type="sigma_min").set_timesteps(500)
    with pytest.raises(ValueError, match="`mu` must be a number"):
        FlowDPMSolverScheduler(use_dynamic_shifting=True).set_timesteps(5)


def test_step_refuses_wrong_order_of_calls():
    scheduler = FlowDPMSolverScheduler()
    with pytest.raises(ValueError, match="before `set_timesteps`"):
        scheduler.step(latents(), 999, latents())
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="`timestep` must be one of"):
        scheduler.step(latents(), 123, latents())
    run(scheduler, latents())
    with pytest.raises(ValueError, match="after the last of 2 steps"):
        scheduler.step(latents(), 999, latents())
