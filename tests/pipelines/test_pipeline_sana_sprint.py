"""`SanaSprintPipeline` against diffusers', and what only ours does."""

import diffusers
import pytest
import torch
from diffusers import AutoPipelineForText2Image, FirstBlockCacheConfig

import diffusers_sana
from diffusers_sana import SanaSprintPipeline, cli
from tests import tiny
from tests.numerics import assert_close_fp32
from tests.pipelines.sprint_cases import CALL, sprint_pipeline


PAPER_ANGLES = [1.5683, 1.3, 1.1, 0.6, 0.0]


@pytest.fixture(scope="module")
def ours():
    return sprint_pipeline(diffusers_sana)


@pytest.fixture(scope="module")
def upstream():
    return sprint_pipeline(diffusers)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_inference_steps": 1},
        {},
        {"num_inference_steps": 3},
        {"num_inference_steps": 4, "max_timesteps": 1.5, "guidance_scale": 2.0},
        {"intermediate_timesteps": 1.1, "prompt": ["a fox", "two red apples"], "guidance_scale": 0.5},
        {"output_type": "latent", "num_images_per_prompt": 2, "complex_human_instruction": None},
    ],
    ids=["1", "2", "3", "4", "batch", "latents"],
)
def test_equals_diffusers(ours, upstream, arguments):
    arguments = {**CALL, **arguments}
    images = ours(**arguments, generator=seeded()).images
    if arguments.get("num_inference_steps", 2) != 2:
        arguments["intermediate_timesteps"] = None  # which diffusers insists on
    expected = upstream(**arguments, generator=seeded()).images
    assert_close_fp32(images, expected)
    assert images.std() > 1e-3


def test_latents_callbacks_and_generators(ours, upstream):
    def callback(pipe, i, t, tensors):
        seen.append((i, float(t), tensors["latents"].clone()))
        latents = tensors["latents"] * 0.9 if i == 0 else tensors["latents"]
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.5, "latents": latents}

    arguments = {
        **CALL,
        "latents": torch.randn(2, 4, 16, 32, generator=seeded()),
        "num_images_per_prompt": 2,
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    both = []
    for pipe in (ours, upstream):
        seen = []
        images = pipe(**arguments, generator=[seeded(1), seeded(2)], return_dict=False)[0]
        both.append((images, seen))
    assert_close_fp32(both[0][0], both[1][0])
    assert [step[:2] for step in both[0][1]] == [step[:2] for step in both[1][1]]
    for mine, theirs in zip(both[0][1], both[1][1], strict=True):
        assert_close_fp32(mine[2], theirs[2])


def test_encode_prompt_gives_what_a_call_takes(ours, upstream):
    embeds, mask = ours.encode_prompt("a fox", complex_human_instruction=["Draw:"])
    expected = upstream.encode_prompt("a fox", complex_human_instruction=["Draw:"])
    assert_close_fp32(embeds[mask.bool()], expected[0][expected[1].bool()])
    call = {**CALL, "complex_human_instruction": ["Draw:"]}
    images = ours(**call, generator=seeded()).images
    call["prompt"] = None
    again = ours(**call, prompt_embeds=embeds, prompt_attention_mask=mask, generator=seeded()).images
    assert_close_fp32(images, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guidance_is_rounded_as_in_diffusers(ours, upstream, dtype):
    """To the dtype of the text, before and after `guidance_embeds_scale`: 4.7 becomes 4.6875, and then 0.46875."""
    text = {"prompt_embeds": torch.randn(1, 3, tiny.TEXT_WIDTH).to(dtype), "prompt_attention_mask": torch.ones(1, 3)}
    seen = []
    for pipe in (ours, upstream):
        pipe = type(pipe)(**pipe.components | {"text_encoder": None, "tokenizer": None})
        pipe.set_progress_bar_config(disable=True)
        model = pipe.transformer
        before = model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["guidance"]), with_kwargs=True
        )
        try:
            pipe(**CALL | {"prompt": None}, **text, guidance_scale=4.7, num_inference_steps=2, generator=seeded())
        finally:
            before.remove()
    assert len(seen) == 4
    assert all(torch.equal(guidance.double(), seen[2].double()) for guidance in seen)
    assert (seen[0].item() == pytest.approx(0.47, rel=1e-6)) == (dtype == torch.float32)


def test_half_precision_is_no_worse():
    reference = sprint_pipeline(diffusers)(**CALL, generator=seeded()).images
    errors = [
        (sprint_pipeline(library).to(torch.bfloat16)(**CALL, generator=seeded()).images.float() - reference).norm()
        for library in (diffusers_sana, diffusers)
    ]
    assert errors[0] <= 1.2 * errors[1]


def test_a_schedule_of_ones_own(ours, upstream):
    angles = []

    def callback(pipe, step, t, tensors):
        angles.append(pipe.scheduler.timesteps)
        return {}

    images = ours(**CALL, timesteps=PAPER_ANGLES, callback_on_step_end=callback, generator=seeded()).images
    assert torch.equal(angles[0], torch.tensor(PAPER_ANGLES))
    as_two = ours(**CALL, timesteps=[1.5708, 1.3, 0.0], generator=seeded()).images
    assert torch.equal(as_two, ours(**CALL, generator=seeded()).images)
    assert not torch.equal(images, as_two)


def test_an_interrupted_call_gives_the_image_so_far(ours):
    def stop(pipe, i, t, tensors):
        pipe._interrupt = True

    one = ours(**CALL, num_inference_steps=1, generator=seeded()).images
    interrupted = ours(**CALL, num_inference_steps=2, callback_on_step_end=stop, generator=seeded()).images
    assert torch.equal(interrupted, one)


def test_what_a_callback_makes_of_the_last_latents_is_the_result(ours):
    """diffusers drops it."""
    call = {**CALL, "output_type": "latent"}
    plain = ours(**call, generator=seeded()).images

    def halve(pipe, i, t, tensors):
        return {"latents": tensors["latents"] / 2} if i == 1 else {}

    assert_close_fp32(ours(**call, callback_on_step_end=halve, generator=seeded()).images, plain / 2)


def test_binning_and_default_size():
    pipe = sprint_pipeline(diffusers_sana, sample_size=256)  # 512 pixels with the tiny autoencoder
    seen = []
    pipe(
        "a fox",
        height=500,
        width=260,
        num_inference_steps=1,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors["latents"].shape),
        output_type="latent",
    )
    assert seen == [(1, 4, 352, 176)]


def test_folders_and_auto_pipeline(tmp_path, upstream):
    upstream.save_pretrained(tmp_path)
    expected = upstream(**CALL, generator=seeded()).images
    for cls in (SanaSprintPipeline, AutoPipelineForText2Image):
        pipe = cls.from_pretrained(tmp_path)
        assert type(pipe) is SanaSprintPipeline
        assert type(pipe.transformer) is diffusers_sana.SanaTransformer2DModel
        assert_close_fp32(pipe(**CALL, generator=seeded()).images, expected)
    pipe.save_pretrained(tmp_path / "ours")
    again = diffusers.SanaSprintPipeline.from_pretrained(tmp_path / "ours")
    assert_close_fp32(again(**CALL, generator=seeded()).images, expected)


def test_the_command_line(tmp_path, capsys, upstream):
    upstream.save_pretrained(tmp_path / "sprint")
    command = ["generate", "a fox", "--model", str(tmp_path / "sprint"), "--out", str(tmp_path / "fox.png")]
    cli.main([*command, "--steps", "1", "--height", "32"])
    assert capsys.readouterr().out == f"{tmp_path / 'fox.png'}\n"
    with pytest.raises(SystemExit):
        cli.main([*command, "--overwrite", "--negative-prompt", "dogs"])
    assert "--negative-prompt must be left out for SANA-Sprint" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["model", "group"])
def test_offloading(ours, method):
    pipe = sprint_pipeline(diffusers_sana)
    cpu = torch.device("cpu")
    if method == "group":
        pipe.enable_group_offload(cpu, cpu, num_blocks_per_group=1, offload_type="block_level")
    else:
        pipe.enable_model_cpu_offload(device="cpu")
    assert_close_fp32(pipe(**CALL, generator=seeded()).images, ours(**CALL, generator=seeded()).images)


def test_upstream_components_work(ours, upstream):
    pipe = SanaSprintPipeline(**upstream.components)
    assert_close_fp32(pipe(**CALL, generator=seeded()).images, upstream(**CALL, generator=seeded()).images)


def test_an_adapter_and_its_scale():
    pipe = sprint_pipeline(diffusers_sana)
    plain = pipe(**CALL, generator=seeded()).images
    lora = {
        f"transformer.transformer_blocks.0.attn2.to_q.lora_{name}.weight": torch.full(shape, 0.5)
        for name, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    pipe.load_lora_weights(lora)
    adapted = pipe(**CALL, generator=seeded()).images
    assert not torch.allclose(adapted, plain)
    off = pipe(**CALL, generator=seeded(), attention_kwargs={"scale": 0.0}).images
    assert_close_fp32(off, plain)


def test_four_bits():
    pipe = sprint_pipeline(diffusers_sana)
    plain = pipe(**CALL, generator=seeded()).images
    diffusers_sana.quantize(pipe, diffusers_sana.SVDQuantConfig(rank=4))
    images = pipe(**CALL, generator=seeded()).images
    assert torch.equal(images, pipe(**CALL, generator=seeded()).images)
    assert 0 < (images - plain).norm() < 0.5 * plain.norm()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"timesteps": [1.3, 1.5, 0.0]}, ValueError, "`timesteps` must be descending angles"),
        ({"timesteps": [1.5]}, ValueError, "one more than there are steps"),
        ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` must be at least 1"),
        ({"guidance_scale": "4"}, TypeError, "`guidance_scale` must be a number"),
        ({"callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"]}, ValueError, "must be names out of"),
        ({"height": 31}, ValueError, "`height` must be a multiple"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, ValueError, "`latents` must have the shape"),
    ],
)
def test_wrong_arguments(ours, arguments, error, message):
    with pytest.raises(error, match=message):
        ours(**{**CALL, **arguments})


def test_wrong_components_and_step_caches(ours):
    plain = SanaSprintPipeline(**{**ours.components, "transformer": tiny.transformer(diffusers_sana)})
    with pytest.raises(ValueError, match="`transformer` must be SANA-Sprint's"):
        plain(**CALL)
    flow = SanaSprintPipeline(**{**ours.components, "scheduler": tiny.scheduler()})
    with pytest.raises(TypeError, match="`scheduler` must be an SCMScheduler, got DPMSolverMultistepScheduler"):
        flow(**CALL)
    with pytest.raises(ValueError, match="`config` must not be given to SANA-Sprint"):
        ours.transformer.enable_cache(FirstBlockCacheConfig())
