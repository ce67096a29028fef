"""TrigFlow, the student's beginning, the consistency tangent and the latent discriminator, against their formulas."""

import math

import pytest
import torch
from diffusers import SCMScheduler
from diffusers.models.attention_dispatch import attention_backend

import diffusers_sana
from diffusers_sana import SanaSprintPipeline
from diffusers_sana.kernels.dispatch import kernel_mode
from diffusers_sana.models.transformers.sprint_student import DENSE_SCALE, make_student
from diffusers_sana.schedulers.trigflow import (
    MAX_ANGLE,
    STEP_ANGLES,
    angles_to_sigmas,
    clean_latents,
    flow_to_trigflow,
    mix,
    sample_angles,
    sample_consistency,
)
from diffusers_sana.training.objectives.adversarial import DiscriminatorHeads, default_blocks, teacher_features
from diffusers_sana.training.objectives.flow_matching import ConditionedTransformer, interpolate, velocity_target
from diffusers_sana.training.objectives.trigflow_distillation import (
    TrigFlowStudent,
    consistency_tangent,
    directional_derivative,
    guided_prediction,
    weighted_loss,
)
from tests import tiny
from tests.numerics import assert_close_fp32, relative_error


QK_NORM = {"qk_norm": "rms_norm_across_heads"}


def make_teacher(**changes):
    return tiny.transformer(diffusers_sana, **QK_NORM | changes)


def make_inputs(count=3, length=5):
    latents, noise = torch.randn(2, count, 4, 4, 4, dtype=torch.float64)
    prompt = torch.randn(count, length, tiny.TEXT_WIDTH, dtype=torch.float64), torch.ones(count, length)
    prompt[1][0, 3:] = 0
    return latents, noise, torch.linspace(0.2, 1.5, count, dtype=torch.float64), prompt


def test_conversion_is_exact():
    """A perfect network of flow matching becomes a perfect one of TrigFlow."""
    latents, noise, angles, _ = make_inputs()
    asked = {}

    def flow(scaled, sigmas):
        asked.update(scaled=scaled, sigmas=sigmas)
        return velocity_target(latents, noise)

    noisy = mix(latents, noise, angles)
    prediction = flow_to_trigflow(flow, noisy, angles)
    assert torch.allclose(asked["scaled"], interpolate(latents, noise, asked["sigmas"]), rtol=0, atol=1e-14)
    cos, sin = angles.cos().view(-1, 1, 1, 1), angles.sin().view(-1, 1, 1, 1)
    assert torch.allclose(prediction, cos * noise - sin * latents, rtol=0, atol=1e-13)  # dx_t / dt
    assert torch.allclose(clean_latents(noisy, prediction, angles), latents, rtol=0, atol=1e-13)
    signal_to_noise = (1 - angles_to_sigmas(angles)) / angles_to_sigmas(angles)
    assert torch.allclose(signal_to_noise, 1 / angles.tan())


def test_conversion_and_sampler_are_the_pipelines():
    """The student in training is the student in `SanaSprintPipeline`: equal latents for every schedule."""
    parts = tiny.components(diffusers_sana)
    student = make_student(make_teacher()).eval()
    torch.nn.init.normal_(student.time_embed.guidance_embedder.linear_2.weight, std=0.3)
    pipe = SanaSprintPipeline(**parts | {"transformer": student, "scheduler": SCMScheduler(sigma_data=0.5)})
    pipe.set_progress_bar_config(disable=True)
    noise, embeds = torch.randn(2, 4, 16, 16), torch.randn(2, 5, tiny.TEXT_WIDTH)
    mask = torch.ones(2, 5)
    model = TrigFlowStudent(student)
    for angles in STEP_ANGLES.values():
        options = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "latents": noise, "timesteps": angles}
        generated = pipe(**options, output_type="latent", generator=torch.Generator().manual_seed(1)).images
        ours = sample_consistency(
            lambda x, t: model(x, t, torch.full([2], 4.5), (embeds, mask))[0],
            noise,
            angles,
            torch.Generator().manual_seed(1),
        )
        assert_close_fp32(ours, generated)


def test_angles():
    angles = sample_angles(20_000, mean=0.3, std=1.6, sigma_data=0.5)
    logs = (angles.double().tan() * 0.5).log()
    assert logs.mean().item() == pytest.approx(0.3, abs=0.05)
    assert logs.std().item() == pytest.approx(1.6, abs=0.05)
    assert angles.min() > 0
    assert angles.max() < MAX_ANGLE


@pytest.mark.parametrize("scale", [1.0, DENSE_SCALE])
def test_student_begins_as_the_teacher(scale):
    """Exactly where the teacher's time is dense already; nearly, by the fit in closed form, where it is not."""
    teacher = make_teacher(timestep_scale=scale)
    if scale == 1.0:  # made smooth in the noise level, as a trained one is: it sees waves of at least 600 steps only
        first = teacher.time_embed.emb.timestep_embedder.linear_1.weight.data
        waves = torch.exp(-math.log(10_000) * torch.arange(first.shape[1] // 2) / (first.shape[1] // 2))
        first *= (waves < 0.01).repeat(2)
    student = make_student(teacher).eval()
    assert student.config.guidance_embeds
    assert student.config.timestep_scale == DENSE_SCALE
    latents = torch.randn(9, teacher.config.in_channels, 4, 4)
    text, sigmas = torch.randn(9, 5, teacher.config.caption_channels), torch.linspace(0.02, 0.98, 9)
    with torch.no_grad():
        expected = teacher(latents, text, sigmas * 1000 * scale, return_dict=False)[0]
        actual = student(latents, text, sigmas, guidance=torch.linspace(0.1, 0.9, 9), return_dict=False)[0]
    if scale == 1.0:
        assert relative_error(actual, expected) < 0.03
    else:
        assert_close_fp32(actual, expected)


def test_student_gets_norms_that_the_teacher_lacks():
    student = make_student(make_teacher(qk_norm=None))
    assert student.config.qk_norm == "rms_norm_across_heads"
    assert torch.equal(student.transformer_blocks[0].attn2.norm_k.weight, torch.ones(16))
    with pytest.raises(ValueError, match="`teacher` must be a Sana without guidance embedding"):
        make_student(student)


def test_guided_prediction_is_classifier_free_guidance():
    latents, noise, angles, prompt = make_inputs()
    latents, noise, angles = latents.float(), noise.float(), angles.float()
    prompt = tuple(part.float() for part in prompt)
    teacher = make_teacher()
    guide = ConditionedTransformer(teacher, dense_timesteps=True)
    noisy, guidance = mix(latents, noise, angles), torch.tensor([1.0, 4.0, 5.0])

    def velocity(scaled, sigmas):
        def run(text, mask):
            return teacher(scaled, text, sigmas * 1000, encoder_attention_mask=mask, return_dict=False)[0]

        empty = run(prompt[0][:, :1], prompt[1][:, :1])
        return empty + guidance.view(-1, 1, 1, 1) * (run(*prompt) - empty)

    with torch.no_grad():
        expected = flow_to_trigflow(velocity, noisy, angles)
    assert_close_fp32(guided_prediction(guide, noisy, angles, guidance, prompt), expected)


def test_derivative_along_the_path():
    """Forward mode through the whole student, against central differences."""
    latents, noise, angles, prompt = make_inputs()
    prompt, angles = tuple(part.float() for part in prompt), angles.float()
    student = TrigFlowStudent(make_student(make_teacher(timestep_scale=DENSE_SCALE))).eval()
    noisy, direction, guidance = mix(latents, noise, angles).float(), torch.randn(3, 4, 4, 4), torch.full([3], 4.5)

    def predict(x, t):
        return student(x, t, guidance, prompt)[0]

    value, derivative = directional_derivative(predict, noisy, angles, direction)
    assert not value.requires_grad
    assert not derivative.requires_grad
    factor, step = angles.cos() * angles.sin(), 3e-4  # short: ReLUs make kinks, one of them within 1e-3 here
    with torch.no_grad():
        assert_close_fp32(value, predict(noisy, angles))
        ahead, behind = (
            predict(noisy + s * factor.view(-1, 1, 1, 1) * direction, angles + s * factor) for s in (step, -step)
        )
    assert relative_error(derivative, (ahead - behind) / (2 * step)) < 2e-3


def test_forward_mode_needs_open_attention_and_reference_kernels():
    """Why `directional_derivative` sets the attention, and its callers the kernel mode."""
    student = TrigFlowStudent(make_student(make_teacher())).eval()
    x, t, guidance = torch.randn(2, 4, 4, 4), torch.tensor([0.5, 1.0]), torch.tensor([4.5, 4.5])
    prompt = torch.randn(2, 5, tiny.TEXT_WIDTH), torch.ones(2, 5)

    def predict(x, t):
        return student(x, t, guidance, prompt)[0]

    with torch.no_grad(), attention_backend("native"), pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(predict, (x, t), (x, t))
    with kernel_mode("torch"):
        assert directional_derivative(predict, x, t, x)[1].isfinite().all()


def test_tangent():
    """Equation of sCM, in units of sigma_data, against the derivative of the output cos(t) x - sin(t) F."""
    noisy, prediction, direction, change = torch.randn(4, 3, 2, 4, 4, dtype=torch.float64)
    angles = torch.tensor([0.3, 1.0, MAX_ANGLE], dtype=torch.float64)
    cos, sin = angles.cos().view(-1, 1, 1, 1), angles.sin().view(-1, 1, 1, 1)
    output = -sin * noisy + cos * direction - cos * prediction - sin * change  # d/dt along the path
    expected = 0.5 * cos * output
    expected = expected / (expected.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 0.1)
    arguments = (noisy, angles, (prediction, cos * sin * change), direction)
    assert torch.allclose(consistency_tangent(*arguments), expected, atol=1e-12)
    assert consistency_tangent(*arguments)[2].abs().max() < 1e-12  # nothing is to be learned where all is noise
    # At the beginning of the warm-up only the distance to the teacher counts.
    towards = consistency_tangent(*arguments, warmup=0.0)[0]
    cosine = torch.nn.functional.cosine_similarity(towards.flatten(), (direction - prediction)[0].flatten(), dim=0)
    assert cosine == pytest.approx(1)


def test_weighted_loss():
    prediction = torch.randn(2, 1, 2, 2, requires_grad=True)
    tangent, log_variance = torch.full([2, 1, 2, 2], 0.5), torch.tensor([0.0, 1.0], requires_grad=True)
    loss = weighted_loss(prediction, prediction.detach() + tangent, log_variance)
    assert loss.item() == pytest.approx((1 + 0 + math.exp(-1) + 1) / 2)
    loss.backward()
    assert torch.allclose(prediction.grad[0], -tangent[0])  # 2 / B times the tangent, downhill
    assert log_variance.grad[0] == pytest.approx(0)  # the error is 1, and its log is right


def test_discriminator():
    assert default_blocks(20) == (2, 8, 14, 19)
    assert default_blocks(8) == (1, 3, 5, 7)
    assert default_blocks(2) == (0, 1)
    teacher = make_teacher().requires_grad_(False)
    latents, noise, angles, prompt = make_inputs()
    noisy = mix(latents, noise, angles).float().requires_grad_(True)
    prompt = tuple(part.float() for part in prompt)
    features = teacher_features(ConditionedTransformer(teacher), noisy, angles.float(), prompt, (0, 1))
    assert [tuple(feature.shape) for feature in features] == [(3, 16, 4, 4)] * 2
    assert not any(block._forward_hooks for block in teacher.transformer_blocks)
    heads = DiscriminatorHeads(16, 2, channels=8)
    logits = heads(features)
    assert logits.shape == (3, 2 * 16)
    logits.mean().backward()
    assert noisy.grad.abs().sum() > 0
    assert all(p.grad is not None for p in heads.parameters())
    # Frozen features, which have crashed the backward pass when they were not contiguous.
    heads([feature.detach() for feature in features]).mean().backward()
    # The last block's output is what the end of the network gets.
    with torch.no_grad():
        again = teacher_features(ConditionedTransformer(teacher), noisy, angles.float(), prompt, (1,))[0]
    assert_close_fp32(again, features[1].detach())  # other operations without gradients, equal results
