"""Several ControlNets in one pipeline: their outputs are summed, each with its own image, scale and interval."""

from copy import deepcopy

import diffusers
import pytest
import torch

import diffusers_sana
from diffusers_sana import SanaMultiControlNetModel, SVDQuantConfig, quantize
from tests import tiny
from tests.numerics import assert_close_fp32, relative_error
from tests.pipelines.controlnet_cases import EDGES, controlnet, generate, pipeline


BLURRED = EDGES[:, ::-1].copy()
WIRINGS = {"diffusers": "diffusers", "nvlabs": "nvlabs"}


def net(seed=0, **changes):
    """A ControlNet whose weights differ by `seed`."""
    model = controlnet(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * seed)
    return model


@pytest.fixture(scope="module")
def parts():
    return tiny.components(diffusers_sana, num_layers=3)


def multi(parts, *nets):
    return pipeline(parts={**parts, "controlnet": list(nets)})


@pytest.mark.parametrize("wiring", WIRINGS)
def test_one_of_them_is_that_one(parts, wiring):
    single = pipeline(parts={**parts, "controlnet": net(wiring=wiring)})
    pipe = multi(parts, net(wiring=wiring))
    assert type(pipe.controlnet) is SanaMultiControlNetModel
    options = {"controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.5, "num_images_per_prompt": 2}
    assert torch.equal(generate(pipe, control_image=[EDGES], **options), generate(single, **options))


def outputs_of(model, latents, embeds, times, cond, scale):
    return model(latents, embeds, times, cond, conditioning_scale=scale, return_dict=False)[0]


@pytest.mark.parametrize("second", WIRINGS)
@pytest.mark.parametrize("first", WIRINGS)
def test_residuals_are_summed(first, second):
    """Also of different depth and of different variants, whose outputs belong to different blocks."""
    nets = [net(1, wiring=first, num_layers=2), net(2, wiring=second, num_layers=1)]
    generator = torch.Generator().manual_seed(0)
    latents, *conds = torch.randn(3, 2, tiny.LATENT_CHANNELS, 4, 4, generator=generator)
    block = torch.randn(2, 16, 16, generator=generator)
    embeds = torch.randn(2, 5, tiny.TEXT_WIDTH, generator=generator)
    times, scales = torch.tensor([300.0, 300.0]), [0.3, 0.6]
    has_inner = "nvlabs" in (first, second)
    sums = {}
    for each, wiring, cond, scale in zip(nets, (first, second), conds, scales, strict=True):
        stream = block if wiring == "nvlabs" else latents
        behind = 1 if has_inner and wiring == "diffusers" else 0
        for index, sample in enumerate(outputs_of(each, stream, embeds, times, cond, scale), behind):
            sums[index] = sums.get(index, 0) + sample
    model = SanaMultiControlNetModel(nets)
    arguments = [times] * 2, conds, scales, model.encode_text(embeds)
    found = model(latents, *arguments, first_block=block if has_inner else None).controlnet_block_samples
    assert len(found) == max(sums) + 1
    for index, sample in enumerate(found):
        assert_close_fp32(sample, torch.as_tensor(sums.get(index, 0.0)).expand_as(sample))


def test_equal_controlnets_add_up(parts):
    """Two that are equal, at half the strength each, are one."""
    single = pipeline(parts={**parts, "controlnet": net(1)})
    pipe = multi(parts, net(1), net(1))
    found = generate(pipe, control_image=[EDGES, EDGES], controlnet_conditioning_scale=[0.25, 0.75])
    assert_close_fp32(found, generate(single))
    whole = generate(pipe, control_image=[EDGES, EDGES], controlnet_conditioning_scale=0.5)
    assert_close_fp32(whole, generate(single))


@pytest.mark.parametrize("second", WIRINGS)
def test_each_has_its_own_scale_and_interval(parts, second):
    pipe = multi(parts, net(1), net(2, wiring=second))
    first_alone = pipeline(parts={**parts, "controlnet": pipe.controlnet.nets[0]})
    images = {"control_image": [EDGES, BLURRED], "num_inference_steps": 4}
    runs = []
    hooks = [
        each.input_block.register_forward_hook(lambda *_, index=index: runs.append(index))
        for index, each in enumerate(pipe.controlnet.nets)
    ]
    both = generate(pipe, **images)
    assert runs == [0, 1] * 4
    runs.clear()
    off = generate(pipe, **images, controlnet_conditioning_scale=[1.0, 0.0])
    assert runs == [0] * 4
    assert_close_fp32(off, generate(first_alone, num_inference_steps=4))
    runs.clear()
    spans = {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]}
    in_turn = generate(pipe, **images, **spans)
    assert runs == [0, 0, 1, 1]
    for hook in hooks:
        hook.remove()
    swapped = generate(pipe, **images | {"control_image": [BLURRED, EDGES]})
    outputs = [both, off, in_turn, swapped]
    assert all(relative_error(a, b) > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])


def test_images_per_prompt_and_per_controlnet(parts):
    pipe = multi(parts, net(1), net(2))
    prompts = ["a cat", "a dog"]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = generate(pipe, prompts, control_image=[EDGES, [BLURRED[0], EDGES[0]]], generator=generators)
    for index, (prompt, image) in enumerate(zip(prompts, (BLURRED, EDGES), strict=True)):
        alone = generate(
            pipe, prompt, control_image=[EDGES, image], generator=torch.Generator().manual_seed(3 + index)
        )
        assert relative_error(both[index], alone[0]) < 1e-4


def test_a_tensor_sets_the_size(parts):
    pipe = multi(parts, net(1), net(2))
    tensor = torch.zeros(1, 3, 32, 64)
    options = {"height": None, "width": None, "num_inference_steps": 1, "output_type": "pt"}
    assert generate(pipe, control_image=[EDGES, tensor], **options).shape == (1, 3, 32, 64)
    with pytest.raises(ValueError, match=r"`control_image` must have the size of generation.*got \[1, 3, 32, 32\]"):
        generate(pipe, control_image=[tensor, tensor[..., :32]], **options)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"control_image": EDGES}, TypeError, "`control_image` must be a list with an entry for each.*got ndarray"),
        ({"control_image": [EDGES]}, ValueError, "`control_image` must have an entry for each of the 2.*got 1"),
        ({"controlnet_conditioning_scale": [1.0]}, ValueError, "`controlnet_conditioning_scale` must have.*2.*got 1"),
        ({"control_guidance_start": [0.0] * 3}, ValueError, "`control_guidance_start` must have.*2.*got 3"),
        ({"control_guidance_end": [0.5, 0.0]}, ValueError, "got 0.0 and 0.0"),
        ({"controlnet_conditioning_scale": ["1", 1]}, TypeError, "`controlnet_conditioning_scale`.*got '1'"),
    ],
)
def test_says_what_is_wrong(parts, kwargs, error, match):
    with pytest.raises(error, match=match):
        generate(multi(parts, net(1), net(2)), **{"control_image": [EDGES, EDGES]} | kwargs)


def test_says_which_controlnets_cannot_be_combined(parts):
    with pytest.raises(ValueError, match="`controlnets` must be a list of at least one"):
        SanaMultiControlNetModel([])
    with pytest.raises(TypeError, match="must be of the SanaControlNetModel of this package, got diffusers"):
        SanaMultiControlNetModel([controlnet(diffusers)])
    with pytest.raises(ValueError, match="their `caption_channels` are 8 and 16"):
        generate(multi(parts, net(1), net(2, caption_channels=8)), control_image=[EDGES, EDGES])
    with pytest.raises(ValueError, match="`conditioning_scale` must not be 0 for every"):
        SanaMultiControlNetModel([net()])(None, [0], [0], [0.0], [0])
    with pytest.raises(ValueError, match="`first_block` must be given"):
        SanaMultiControlNetModel([net(wiring="nvlabs")])(None, [0], [0], [1.0], [0])


@pytest.mark.parametrize("variant", [None, "fp32"])
def test_saved_and_loaded(parts, tmp_path, variant):
    pipe = multi(parts, net(1), net(2, wiring="nvlabs", num_layers=2))
    pipe.save_pretrained(tmp_path, variant=variant)
    assert len(list(tmp_path.glob("controlnet/[01].*/config.json"))) == 2
    expected = generate(pipe, control_image=[EDGES, BLURRED])
    for loader in (diffusers_sana.SanaControlNetPipeline, diffusers.DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path, variant=variant)
        loaded.set_progress_bar_config(disable=True)
        assert [each.config.wiring for each in loaded.controlnet.nets] == ["diffusers", "nvlabs"]
        assert_close_fp32(generate(loaded, control_image=[EDGES, BLURRED]), expected)


def test_callbacks_get_a_list(parts):
    pipe = multi(parts, net(1), net(2))
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append(tensors["control_image"])
        return {"control_image": [-image for image in tensors["control_image"]]}

    names = {"callback_on_step_end_tensor_inputs": ["control_image"]}
    found = generate(pipe, control_image=[EDGES, BLURRED], callback_on_step_end=callback, **names)
    assert [image.shape for image in seen[0]] == [(1, tiny.LATENT_CHANNELS, 16, 16)] * 2
    assert torch.equal(seen[1][0], -seen[0][0])
    assert relative_error(found, generate(pipe, control_image=[EDGES, BLURRED])) > 1e-3


def test_with_a_guider_and_offloading(parts):
    pipe = multi(parts, net(1), net(2, wiring="nvlabs"))
    images = {"control_image": [EDGES, BLURRED]}
    plain = generate(pipe, **images)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.5)
    assert_close_fp32(generate(pipe, **images, guider=guider), plain)
    pipe.enable_model_cpu_offload(device="cpu")
    assert_close_fp32(generate(pipe, **images), plain)


@pytest.mark.parametrize("calibrated", [False, True])
def test_four_bits(parts, tmp_path, calibrated):
    """Each is quantized as it would be alone: its projections stay in 16 bits, and its own folder says so."""
    images = {"control_image": [EDGES, BLURRED]}
    pipe = multi(deepcopy(parts), net(1), net(2, wiring="nvlabs"))
    plain = generate(pipe, **images)
    data = {"prompts": ["a cat"], "num_inference_steps": 1, **images, "height": 32, "width": 32} if calibrated else {}
    report = quantize(pipe, SVDQuantConfig(rank=4), components=("transformer", "controlnet"), progress=False, **data)
    alone = net(1)
    quantize(alone, SVDQuantConfig(rank=4), progress=False)
    names = {name for name, module in alone.named_modules() if hasattr(module, "qweight")}
    for each in pipe.controlnet.nets:
        assert {name for name, module in each.named_modules() if hasattr(module, "qweight")} == names
    assert {f"controlnet.nets.1.{name}" for name in names} <= {each.layer for each in report.layers}
    quantized = generate(pipe, **images)
    assert 0 < relative_error(quantized, plain) < 0.5
    pipe.save_pretrained(tmp_path)
    loaded = diffusers_sana.SanaControlNetPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert relative_error(generate(loaded, **images), quantized) < 0.05


def test_of_sana_1_5(tmp_path):
    """Whose transformer has norms of queries and keys; a ControlNet made from it has them too."""
    parts = tiny.components(diffusers_sana, num_layers=3, qk_norm="rms_norm_across_heads")
    made = diffusers_sana.SanaControlNetModel.from_transformer(parts["transformer"], num_layers=2)
    assert made.config.qk_norm == "rms_norm_across_heads"
    pipe = pipeline(parts={**parts, "controlnet": made})
    plain = generate(pipe, controlnet_conditioning_scale=0.0)
    assert_close_fp32(generate(pipe), plain)  # not trained yet
    with torch.no_grad():
        for head in made.controlnet_blocks:
            torch.nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    steered = generate(pipe)
    assert relative_error(steered, plain) > 1e-3
    pipe.save_pretrained(tmp_path)
    loaded = diffusers_sana.SanaControlNetPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_close_fp32(generate(loaded), steered)
