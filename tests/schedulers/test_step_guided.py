"""`FlowDPMSolverScheduler.step_guided` against guidance in the open, followed by `step`."""

import pytest
import torch

from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.schedulers.scheduling_flow_dpm_solver import FlowDPMSolverScheduler
from tests.kernels.kernel_checks import DEVICE
from tests.numerics import assert_close_fp32


SCALE = 4.5
SOLVERS = {
    "order_1": {"solver_order": 1},
    "order_2": {},
    "order_3": {"solver_order": 3, "solver_type": "heun"},
    "stochastic": {"algorithm_type": "sde-dpmsolver++"},
    "adams_bashforth": {"algorithm_type": "adams_bashforth", "solver_order": 3},
}


def latents(dtype=torch.float32):
    return torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def model(sample, timestep, dtype):
    """Both halves of a guided batch, channels last in memory as a transformer's output."""
    level = float(timestep) / 1000
    halves = torch.tanh(1.3 * sample) * (1 - level), level * sample.flip(1)
    return torch.cat(halves).to(dtype, memory_format=torch.channels_last)


def guided(scheduler, output, timestep, sample, generator):
    return scheduler.step_guided(output, timestep, sample, SCALE, generator=generator).prev_sample


def in_the_open(scheduler, output, timestep, sample, generator):
    unconditional, conditional = output.to(torch.promote_types(output.dtype, torch.float32)).chunk(2)
    velocity = unconditional + SCALE * (conditional - unconditional)
    return scheduler.step(velocity, timestep, sample, generator=generator).prev_sample


def run(step, options, num_steps, dtype=torch.float32, sample=None):
    scheduler = FlowDPMSolverScheduler(flow_shift=3.0, **options)
    scheduler.set_timesteps(num_steps)
    sample, generator = latents() if sample is None else sample, torch.Generator().manual_seed(1)
    for timestep in scheduler.timesteps:
        sample = step(scheduler, model(sample, timestep, dtype), timestep, sample, generator)
    assert scheduler.step_index == num_steps
    return sample


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", SOLVERS.values(), ids=SOLVERS)
def test_equals_guidance_and_step(options, dtype, mode):
    with kernel_mode("torch"):
        expected = run(in_the_open, options, 16, dtype)
    with kernel_mode(mode):
        actual = run(guided, options, 16, dtype)
    if mode == "torch":
        assert torch.equal(actual, expected)
    # What fp32 rounds otherwise can move the next model output by a unit of its half precision.
    assert_close_fp32(actual, expected, tolerance=1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("options", SOLVERS.values(), ids=SOLVERS)
def test_the_kernel_also_takes_steps_without_guidance(options):
    def plain(scheduler, output, timestep, sample, generator):
        return scheduler.step(output[:2], timestep, sample, generator=generator, return_dict=False)[0]

    with kernel_mode("torch"):
        expected = run(plain, options, 16)
    with kernel_mode("triton"):
        assert_close_fp32(run(plain, options, 16), expected)


def test_float64_and_half_samples():
    double = run(guided, {}, 5, torch.float64, latents(torch.float64))
    assert double.dtype == torch.float64
    assert_close_fp32(run(guided, {}, 5), double)
    assert run(guided, {}, 5, torch.float16, latents(torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("options", SOLVERS.values(), ids=SOLVERS)
def test_does_not_depend_on_its_inputs_afterwards(options, mode):
    """Compiled models write their next output into the same memory."""

    def overwriting(scheduler, output, timestep, sample, generator):
        result = guided(scheduler, output, timestep, sample, generator)
        output.fill_(torch.nan)
        sample.fill_(torch.nan)
        return result

    with kernel_mode(mode):
        assert torch.equal(run(overwriting, options, 6), run(guided, options, 6))


def test_a_run_may_drop_guidance_on_its_way():
    outputs = []
    for step in (guided, in_the_open):
        scheduler = FlowDPMSolverScheduler(flow_shift=3.0)
        scheduler.set_timesteps(6)
        sample = latents()
        for index, timestep in enumerate(scheduler.timesteps):
            output = model(sample, timestep, torch.float32)
            if index < 3:
                sample = step(scheduler, output, timestep, sample, None)
            else:
                sample = scheduler.step(output[2:], timestep, sample).prev_sample
        outputs.append(sample)
    assert torch.equal(*outputs)


def test_noise_can_be_given():
    scheduler = FlowDPMSolverScheduler(algorithm_type="sde-dpmsolver++")
    noise, sample = torch.randn_like(latents()), latents()
    outputs = []
    for given in (noise, 2 * noise):
        scheduler.set_timesteps(4)
        output = model(sample, 999, torch.float32)
        outputs.append(scheduler.step_guided(output, 999, sample, SCALE, variance_noise=given, return_dict=False)[0])
    weight = scheduler._rules[0][0].noise
    assert weight > 0
    assert_close_fp32(outputs[1] - outputs[0], weight * noise)


def test_refuses():
    scheduler, sample = FlowDPMSolverScheduler(), latents()
    output = torch.cat([sample, sample])
    with pytest.raises(ValueError, match="before `set_timesteps`"):
        scheduler.step_guided(output, 999, sample, SCALE)
    scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match=r"`model_output` must be \[4, 4, 6, 5\].*call `step`"):
        scheduler.step_guided(sample, 999, sample, SCALE)
    with pytest.raises(TypeError, match="`guidance_scale` must be a number, got None"):
        scheduler.step_guided(output, 999, sample, None)
    assert scheduler.step_index is None  # nothing has happened
    scheduler.step_guided(output, scheduler.timesteps[0], sample, SCALE)
    with pytest.raises(ValueError, match="after the last of 1 steps"):
        scheduler.step_guided(output, 999, sample, SCALE)
