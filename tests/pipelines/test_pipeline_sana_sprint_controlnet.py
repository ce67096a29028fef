"""`SanaSprintControlNetPipeline`: a ControlNet of the teacher, in the steps of the student."""

import diffusers
import pytest
import torch

import diffusers_sana
from tests import tiny
from tests.numerics import assert_close_fp32, relative_error
from tests.pipelines.controlnet_cases import EDGES, controlnet
from tests.pipelines.sprint_cases import CALL, SPRINT, sprint_pipeline


def make(net=None):
    plain = sprint_pipeline(diffusers_sana)
    return diffusers_sana.SanaSprintControlNetPipeline.from_pipe(plain, controlnet=net or controlnet())


@pytest.fixture(scope="module")
def ours():
    return make()


def generate(pipe, **changes):
    given = CALL | {"control_image": EDGES, "output_type": "latent", "complex_human_instruction": None}
    return pipe(**given | {"generator": torch.Generator().manual_seed(3)} | changes).images


def recorded(model, **changes):
    """Generates with `model.controlnet` and keeps the arguments that it gets, step by step."""
    calls = []
    handle = model.controlnet.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({"stream": args[0], **kwargs}), with_kwargs=True
    )
    output = generate(model, **changes)
    handle.remove()
    return output, calls


def test_off_is_the_pipeline_without(ours):
    plain = diffusers_sana.SanaSprintPipeline.from_pipe(ours)
    given = CALL | {"output_type": "latent", "complex_human_instruction": None}
    expected = plain(**given, generator=torch.Generator().manual_seed(3)).images
    assert torch.equal(generate(ours, controlnet_conditioning_scale=0.0), expected)
    steered = generate(ours)
    assert relative_error(steered, expected) > 1e-3
    assert relative_error(generate(ours, control_image=1 - EDGES), steered) > 1e-3


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_gets_the_latents_and_timesteps_of_flow_matching(scale):
    """At angle t the noise level is sin t / (sin t + cos t), and the latents have its mixture of image and noise."""
    pipe = make(controlnet(timestep_scale=scale))
    noise = torch.randn(1, tiny.LATENT_CHANNELS, 16, 32, generator=torch.Generator().manual_seed(0))
    angles = [1.5, 0.8, 0.0]
    _, calls = recorded(pipe, timesteps=angles, latents=noise, num_inference_steps=2)
    assert len(calls) == 2
    for call, angle in zip(calls, torch.tensor(angles[:-1]), strict=True):
        level = angle.sin() / (angle.sin() + angle.cos())
        assert_close_fp32(call["timestep"], (1000 * scale * level)[None])
    level = torch.tensor(1.5).sin() / (torch.tensor(1.5).sin() + torch.tensor(1.5).cos())
    assert_close_fp32(calls[0]["stream"], noise * (level**2 + (1 - level) ** 2).sqrt())


def test_steers_only_the_steps_it_is_told_to(ours):
    outputs, counts = [], []
    for changes in ({}, {"control_guidance_end": 0.5}, {"control_guidance_start": 0.5}):
        output, calls = recorded(ours, num_inference_steps=4, **changes)
        outputs.append(output)
        counts.append(len(calls))
    assert counts == [4, 2, 2]
    assert all(relative_error(a, b) > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])


def test_several_and_both_variants():
    single = make(controlnet(wiring="nvlabs"))
    several = make([controlnet(wiring="nvlabs")])
    assert torch.equal(generate(several, control_image=[EDGES]), generate(single))
    two = make([controlnet(), controlnet(wiring="nvlabs")])
    off = generate(two, control_image=[EDGES, EDGES], controlnet_conditioning_scale=[0.0, 1.0])
    assert_close_fp32(off, generate(single))


def test_a_student_follows_its_teachers_controlnet():
    """The student predicts what the teacher predicts, with the outputs of one ControlNet at one noise level."""
    from diffusers_sana.models.transformers.sprint_student import make_student

    teacher = tiny.transformer(diffusers_sana, num_layers=3, qk_norm=SPRINT["qk_norm"], timestep_scale=0.001)
    net = controlnet(num_layers=2, qk_norm=SPRINT["qk_norm"], timestep_scale=0.001)
    parts = tiny.components(diffusers_sana) | {
        "transformer": make_student(teacher),
        "scheduler": diffusers.SCMScheduler(),
        "controlnet": net,
    }
    pipe = diffusers_sana.SanaSprintControlNetPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    handle = pipe.transformer.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    _, calls = recorded(pipe, num_inference_steps=1, width=32)
    handle.remove()
    (given, student), (call,) = seen[0], calls
    samples = given["controlnet_block_samples"]
    assert_close_fp32(call["timestep"], given["timestep"])
    arguments = {"encoder_hidden_states": None, "text_context": given["text_context"]}
    teachers = teacher(
        given["hidden_states"], timestep=call["timestep"], controlnet_block_samples=samples, **arguments
    ).sample
    assert_close_fp32(student, teachers)


def test_saved_and_found(ours, tmp_path):
    ours.save_pretrained(tmp_path / "folder")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(loaded) is diffusers_sana.SanaSprintControlNetPipeline
    loaded.set_progress_bar_config(disable=True)
    assert_close_fp32(generate(loaded), generate(ours))
    diffusers_sana.SanaSprintPipeline.from_pipe(ours).save_pretrained(tmp_path / "plain")
    auto = diffusers.AutoPipelineForText2Image.from_pretrained(tmp_path / "plain", controlnet=ours.controlnet)
    assert type(auto) is diffusers_sana.SanaSprintControlNetPipeline


def test_says_what_is_wrong(ours):
    with pytest.raises(ValueError, match="`control_image` must be given"):
        generate(ours, control_image=None)
    with pytest.raises(ValueError, match="Take the teacher"):
        diffusers_sana.SanaControlNetModel.from_transformer(ours.transformer, num_layers=1)
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs` must be names out of"):
        generate(ours, callback_on_step_end_tensor_inputs=["negative_prompt_embeds"])
