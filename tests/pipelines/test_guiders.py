"""`guider=`: each guider of diffusers makes of our predictions what its formula says, in every pipeline with it.

The references are written out here in float64, on predictions of a transformer that is called, and changed, by hand.
"""

import copy
import threading
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    LTX2Guidance,
    MagnitudeAwareGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
    frequency_decoupled_guidance,
)
from diffusers.hooks import HookRegistry, LayerSkipConfig, SmoothedEnergyGuidanceConfig
from peft import LoraConfig
from torch.nn import functional as F

import diffusers_sana
from diffusers_sana import SVDQuantConfig, quantize
from diffusers_sana.models.layers import hooks_of
from diffusers_sana.pipelines.changed_layers import blurred
from tests import tiny
from tests.numerics import assert_close_fp32, relative_error
from tests.pipelines import controlnet_cases


CAT, DOG = "A cat, sleeping", "a dog that has eaten too much"
STEPS, GRID = 3, (16, 24)  # tokens
SIZE = {"num_inference_steps": STEPS, "height": 32, "width": 48, "use_resolution_binning": False}


def generate(pipe, prompt=CAT, **kwargs):
    return tiny.generate(pipe, prompt, **{"negative_prompt": "ugly"} | SIZE | kwargs)


def state_of(pipe):
    """What a guider could leave behind on the transformer."""
    modules = list(pipe.transformer.modules())
    return [
        (vars(module).get("forward"), list(hooks_of(module)), getattr(module, "processor", 0)) for module in modules
    ]


# Changes of layers, by hand.
@contextmanager
def replaced(module, forward):
    original = module.forward
    module.forward = lambda *args, **kwargs: forward(original, *args, **kwargs)
    try:
        yield
    finally:
        del module.forward


def skipped(*names: str):
    """Modules return their inputs."""

    @contextmanager
    def change(transformer):
        with ExitStack() as stack:
            for name in names:
                module = transformer.get_submodule(f"transformer_blocks.{name}")
                stack.enter_context(replaced(module, lambda original, x, *args, **kwargs: x))
            yield

    return change


unchanged = skipped()


@contextmanager
def values_only(transformer):
    attention = transformer.transformer_blocks[1].attn1
    with replaced(attention, lambda original, x: attention.to_out[1](attention.to_out[0](attention.to_v(x)))):
        yield


def gaussian(length: int, sigma: float) -> torch.Tensor:
    """The blur along one axis as a matrix in float64, mirrored at the border without repeating it."""
    radius = min((-(-6 * sigma // 1)) // 2, length // 2)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    for row in range(length):
        for offset in range(-int(radius), int(radius) + 1):
            column = abs(row + offset)
            column = 2 * (length - 1) - column if column >= length else column
            matrix[row, column] += float(torch.tensor(-0.5 * (offset / sigma) ** 2, dtype=torch.float64).exp())
    return matrix / matrix.sum(dim=1, keepdim=True)


def blurred_queries(sigma):
    @contextmanager
    def change(transformer):
        def blur(original, x):
            image = original(x).double().unflatten(1, GRID)
            if sigma is None:
                return image.mean(dim=(1, 2), keepdim=True).expand_as(image).flatten(1, 2).float()
            rows, columns = (gaussian(side, sigma) for side in GRID)
            return torch.einsum("hi,wj,bijd->bhwd", rows, columns, image).flatten(1, 2).float()

        with replaced(transformer.transformer_blocks[1].attn1.to_q, blur):
            yield

    return change


# Formulas, in float64. `p(negative=False, change=None)` is a prediction `[B, C, h, w]`, `memory` lives for a call.
def norm(x):
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def inner(x, y):
    return (x * y).flatten(1).sum(dim=1)[:, None, None, None]


def cfg(scale, rescale=0.0, original=False):
    def formula(step, p, memory):
        c, u = p(), p(negative=True)
        v = (c if original else u) + scale * (c - u)
        std = [x.flatten(1).std(dim=1)[:, None, None, None] for x in (c, v)]
        return rescale * v * std[0] / std[1] + (1 - rescale) * v

    return formula


def interval(scale, steps):
    return lambda step, p, memory: cfg(scale)(step, p, memory) if step in steps else p()


def zero_star(scale):
    def formula(step, p, memory):
        c, u = p(), p(negative=True)
        u = u * inner(c, u) / inner(u, u)
        return torch.zeros_like(c) if step == 0 else u + scale * (c - u)

    return formula


def projected(scale, momentum, rescale, eta, first=0, before=None):
    def formula(step, p, memory):
        c, u = p(), p(negative=True)
        memory["average"] = difference = c - u + momentum * memory.get("average", 0)
        if step < first:
            return u + before * (c - u)
        difference = difference * (rescale / norm(difference)).clamp(max=1)
        parallel = inner(difference, c) / inner(c, c) * c
        return u + scale * (difference - parallel + eta * parallel)

    return formula


def tangential(scale):
    def formula(step, p, memory):
        c, u = p(), p(negative=True)
        pairs = torch.stack([c.flatten(1), u.flatten(1)], dim=1)
        values, vectors = torch.linalg.eigh(pairs @ pairs.mT)  # of the Gram matrix, not an SVD
        direction = (vectors[..., -1:] * pairs).sum(dim=1).reshape(c.shape) / values[:, -1:, None, None].sqrt()
        u = inner(u, direction) * direction
        return u + scale * (c - u)

    return formula


def magnitude(scale, alpha):
    def formula(step, p, memory):
        c, u = p(), p(negative=True)
        return u + (1 + (scale - 1) * (-alpha * norm(c - u) / norm(u)).exp()) * (c - u)

    return formula


def down(x):
    return F.avg_pool2d(x, 2)


def up(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


def frequencies(high, low):
    def formula(step, p, memory):
        c, u = p(), p(negative=True)
        base = [up(down(x)) for x in (c, u)]
        detail = c - base[0], u - base[1]
        return base[1] + low * (base[0] - base[1]) + detail[1] + high * (detail[0] - detail[1])

    return formula


def away(scale, other_scale, change, first=0):
    """Classifier-free guidance, and away from a changed transformer."""

    def formula(step, p, memory):
        c = p()
        v = cfg(scale)(step, p, memory) if scale > 1 else c
        if step < first:
            return v
        return v + other_scale * (c - p(change=change))

    return formula


def auto(scale, change):
    def formula(step, p, memory):
        c, bad = p(), p(negative=True, change=change)
        return bad + scale * (c - bad)

    return formula


def pyramid(x, levels):
    assert levels == 2
    x = F.pad(x, (0, 8, 0, 8), mode="reflect")  # as kornia does where no side is a power of two
    return [x - up(down(x)), down(x)]


def skip(**config):
    return LayerSkipConfig(indices=[1], **{"skip_attention": False, "skip_ff": False} | config)


EARLY = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}  # diffusers leaves out the first step
PAG_EARLY = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
GUIDERS: dict[str, tuple[Callable, Callable]] = {
    "CFG": (lambda: ClassifierFreeGuidance(4.5), cfg(4.5)),
    "CFG, rescaled": (lambda: ClassifierFreeGuidance(4.5, guidance_rescale=0.7), cfg(4.5, 0.7)),
    "CFG, original": (lambda: ClassifierFreeGuidance(4.5, use_original_formulation=True), cfg(4.5, original=True)),
    "interval": (lambda: ClassifierFreeGuidance(4.5, start=0.4, stop=0.7), interval(4.5, {1})),
    "off": (lambda: ClassifierFreeGuidance(4.5, enabled=False), interval(4.5, ())),
    "CFG-Zero*": (lambda: ClassifierFreeZeroStarGuidance(4.0), zero_star(4.0)),
    "APG": (
        lambda: AdaptiveProjectedGuidance(5.0, -0.5, adaptive_projected_guidance_rescale=8.0, eta=0.3),
        projected(5.0, -0.5, 8.0, 0.3),
    ),
    "APG after CFG": (
        lambda: AdaptiveProjectedMixGuidance(
            guidance_scale=3.0,
            adaptive_projected_guidance_scale=6.0,
            adaptive_projected_guidance_rescale=8.0,
            adaptive_projected_guidance_start_step=1,
            eta=0.3,
        ),
        projected(6.0, -0.5, 8.0, 0.3, first=2, before=3.0),
    ),
    "TCFG": (lambda: TangentialClassifierFreeGuidance(4.5), tangential(4.5)),
    "MaG": (lambda: MagnitudeAwareGuidance(6.0, alpha=0.5), magnitude(6.0, 0.5)),
    "FDG": (lambda: FrequencyDecoupledGuidance([6.0, 3.0]), frequencies(6.0, 3.0)),
    "AutoGuidance": (
        lambda: AutoGuidance(3.0, auto_guidance_layers=[1], dropout=1.0),  # fails in diffusers' own hook
        auto(3.0, skipped("1")),
    ),
    "AutoGuidance, feed-forward": (
        lambda: AutoGuidance(3.0, auto_guidance_config=skip(skip_ff=True)),
        auto(3.0, skipped("1.ff")),
    ),
    "SLG": (lambda: SkipLayerGuidance(4.5, 2.0, 0.0, 1.0, [1]), away(4.5, 2.0, skipped("1"), first=1)),
    "SLG, without CFG": (lambda: SkipLayerGuidance(1.0, 2.0, 0.0, 1.0, 1), away(1.0, 1.0, skipped("1"), first=1)),
    "SLG, attention": (
        lambda: SkipLayerGuidance(4.5, 2.0, **EARLY, skip_layer_config=skip(skip_attention=True)),
        away(4.5, 2.0, skipped("1.attn1"), first=1),
    ),
    "PAG": (
        lambda: PerturbedAttentionGuidance(4.5, 2.0, **PAG_EARLY, perturbed_guidance_layers=[1]),
        away(4.5, 2.0, values_only, first=1),
    ),
    "SEG": (
        lambda: SmoothedEnergyGuidance(4.5, 2.0, seg_guidance_layers=[1]),
        away(4.5, 2.0, blurred_queries(None), first=1),
    ),
    "SEG, sigma 1.5": (
        lambda: SmoothedEnergyGuidance(4.5, 2.0, 1.5, seg_guidance_config=SmoothedEnergyGuidanceConfig([1])),
        away(4.5, 2.0, blurred_queries(1.5), first=1),
    ),
}
CHANGING = [name for name in GUIDERS if name.startswith(("Auto", "SLG", "PAG", "SEG"))]


@pytest.fixture(autouse=True)
def kornia():
    """Its two functions that FDG uses, which are too many packages to install for them."""
    with (
        patch.object(frequency_decoupled_guidance, "_CAN_USE_KORNIA", True),
        patch.object(frequency_decoupled_guidance, "build_laplacian_pyramid_func", pyramid),
        patch.object(frequency_decoupled_guidance, "upsample_and_blur_func", up),
    ):
        yield


@torch.no_grad()
def by_hand(pipe, formula):
    embeds, mask, negative, negative_mask = pipe.encode_prompt(CAT, negative_prompt="ugly")
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, tiny.LATENT_CHANNELS, *GRID, generator=torch.Generator().manual_seed(3))
    memory: dict = {}
    texts = (embeds, mask), (negative, negative_mask)

    def predict(latents, t, negative=False, change=unchanged):
        text, text_mask = texts[negative]
        with change(pipe.transformer):
            output = pipe.transformer(latents, text, t.expand(1), encoder_attention_mask=text_mask, return_dict=False)
        return output[0].double()

    for step, t in enumerate(scheduler.timesteps):
        guided = formula(step, partial(predict, latents, t), memory)
        latents = scheduler.step(guided.float(), t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("name", GUIDERS)
def test_formula(name, ours):
    make, formula = GUIDERS[name]
    made = generate(ours, guider=make())
    assert_close_fp32(made, by_hand(ours, formula), tolerance=3e-5)
    assert name.startswith("CFG") or relative_error(made, generate(ours)) > 1e-3


@pytest.fixture(scope="module")
def quantized():
    pipe = tiny.pipeline(diffusers_sana)
    quantize(pipe, SVDQuantConfig(rank=4), progress=False)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    pipe.transformer.add_adapter(lora)
    return pipe


@pytest.mark.parametrize("name", ["APG", "SLG", "SLG, attention", "PAG", "SEG, sigma 1.5"])
def test_formula_with_four_bits_and_lora(name, quantized, ours):
    make, formula = GUIDERS[name]
    made = generate(quantized, guider=make())
    # Activations are quantized too; a rounding that falls otherwise is a difference.
    assert_close_fp32(made, by_hand(quantized, formula), tolerance=3e-3)
    assert relative_error(made, generate(ours, guider=make())) > 3e-2


def test_plain_guidance_is_the_default(ours):
    options = {"prompt": [CAT, DOG], "num_images_per_prompt": 2, "negative_prompt": ["x", "ugly"]}
    assert_close_fp32(generate(ours, guider=ClassifierFreeGuidance(4.5), **options), generate(ours, **options), 1e-6)
    one = generate(ours, guider=ClassifierFreeGuidance(1.0))
    assert_close_fp32(one, generate(ours, guidance_scale=1.0), 1e-6)


@pytest.mark.parametrize("name", ["APG", "SLG", "PAG", "SEG, sigma 1.5", "AutoGuidance, feed-forward"])
def test_of_several_prompts_and_with_components_of_diffusers(name, ours, upstream):
    pipe = diffusers_sana.SanaPipeline.from_pipe(upstream)
    assert type(pipe.transformer) is diffusers.SanaTransformer2DModel
    make, _ = GUIDERS[name]
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    batch = generate(pipe, [CAT, DOG], negative_prompt=["x", "ugly"], generator=generators, guider=make())
    for index, (prompt, negative) in enumerate([(CAT, "x"), (DOG, "ugly")]):
        single = generate(ours, prompt, seed=index, negative_prompt=negative, guider=make())
        assert_close_fp32(batch[index : index + 1], single, tolerance=3e-5)


def test_batches_of_the_transformer(ours):
    """One batch of both halves; the prompts alone outside of the interval; texts are projected once."""
    sizes, forward, encode = [], ours.transformer.forward, ours.transformer.encode_text

    def seen(*args, **kwargs):
        sizes.append(len(kwargs["hidden_states"]))
        return forward(*args, **kwargs)

    def batches(guider):
        sizes.clear()
        with (
            patch.object(ours.transformer, "forward", seen),
            patch.object(ours.transformer, "encode_text", side_effect=encode) as encoding,
        ):
            generate(ours, guider=guider)
        assert encoding.call_count == 1
        return list(sizes)

    assert batches(ClassifierFreeGuidance(4.5)) == [2, 2, 2]
    assert batches(ClassifierFreeGuidance(4.5, start=0.4, stop=0.7)) == [1, 2, 1]
    assert batches(GUIDERS["SLG"][0]()) == [2, 2, 1, 2, 1]
    assert batches(GUIDERS["AutoGuidance"][0]()) == [1, 1] * STEPS
    assert batches(SkipLayerGuidance(4.5, 2.0, 0.0, 1.0, 1, enabled=False)) == [1, 1, 1]


def test_dropout_of_a_layer(ours):
    """Of the output, from the global generator, as in diffusers: not reproduced by `generator`."""

    def made(dropout, seed=0):
        torch.manual_seed(seed)
        return generate(ours, guider=AutoGuidance(3.0, auto_guidance_layers=1, dropout=dropout))

    assert torch.equal(made(0.5), made(0.5))
    assert relative_error(made(0.5), made(0.5, seed=1)) > 1e-4
    assert_close_fp32(made(0.0), generate(ours, guidance_scale=3.0), 3e-5)


def test_the_guider_stays_as_it_is(ours):
    """Its momentum, its step, and the configs in it; what was set after it was made counts."""
    for name in ("APG", "SLG, attention", "PAG", "SEG, sigma 1.5"):
        guider = GUIDERS[name][0]()
        before = repr(guider), copy.deepcopy(vars(guider))
        first = generate(ours, guider=guider)
        assert (repr(guider), vars(guider)) == before
        assert torch.equal(generate(ours, guider=guider), first)
    changed = ClassifierFreeGuidance(2.0)
    changed.guidance_scale = 4.5
    assert torch.equal(generate(ours, guider=changed), generate(ours, guider=ClassifierFreeGuidance(4.5)))
    changed.disable()
    assert_close_fp32(generate(ours, guider=changed), generate(ours, guidance_scale=1.0), 1e-6)


def test_threads(ours):
    guiders = [GUIDERS["APG"][0](), GUIDERS["SLG"][0](), GUIDERS["PAG"][0](), None]
    alone = [generate(ours, seed=7, guider=guider) for guider in guiders]
    made = [None] * 8

    def work(number):
        made[number] = generate(ours, seed=7, guider=guiders[number % 4])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(made[number], alone[number % 4]) for number in range(8))


class OwnHooks(SkipLayerGuidance):
    """Changes layers with the hooks of diffusers, as guiders of users do."""

    def prepare_models(self, denoiser):
        super().prepare_models(denoiser)


def test_a_guider_with_hooks_of_its_own(ours):
    options = 4.5, 2.0, 0.0, 1.0
    config = LayerSkipConfig(indices=[1])
    made = generate(ours, guider=OwnHooks(*options, skip_layer_config=config))
    assert_close_fp32(made, generate(ours, guider=SkipLayerGuidance(*options, skip_layer_config=config)))
    assert not any(map(hooks_of, ours.transformer.modules()))
    assert config.fqn == "auto"


@pytest.mark.parametrize("name", [*CHANGING, "own hooks"])
def test_nothing_is_left_on_the_transformer(name):
    pipe = tiny.pipeline(diffusers_sana)
    guider = OwnHooks(4.5, 2.0, 0.0, 1.0, skip_layer_config=skip(skip_attention=True, skip_ff=True))
    guider = guider if name == "own hooks" else GUIDERS[name][0]()
    before, plain = state_of(pipe), generate(pipe)
    calls = []

    def fail(module, args):
        calls.append(len(args[0]))
        if len(calls) == (2 if name.startswith("Auto") else 3):
            raise ZeroDivisionError

    handle = pipe.transformer.proj_out.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        generate(pipe, guider=guider)
    assert calls[-1] == 1  # in the changed transformer
    handle.remove()
    if name != "own hooks":  # the hooks of diffusers leave a `forward` that calls the class's
        assert state_of(pipe) == before
    assert torch.equal(generate(pipe), plain)


def test_pipelines_with_images(ours):
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 32, 48)
    mask[:, :, :16] = 1
    img2img, inpaint = (
        pipeline.from_pipe(ours)
        for pipeline in (diffusers_sana.SanaImg2ImgPipeline, diffusers_sana.SanaInpaintPipeline)
    )
    for pipe, options in (
        (img2img, {"image": image, "strength": 0.7}),
        (inpaint, {"image": image, "mask_image": mask}),
    ):
        default = generate(pipe, **options)
        assert_close_fp32(generate(pipe, guider=ClassifierFreeGuidance(4.5), **options), default)
        assert relative_error(generate(pipe, guider=GUIDERS["PAG"][0](), **options), default) > 1e-3


class TestControlNet:
    @pytest.fixture(scope="class", params=["diffusers", "nvlabs"])
    @classmethod
    def pipe(cls, request):
        net = controlnet_cases.controlnet(wiring=request.param)
        return controlnet_cases.pipeline(parts={"controlnet": net})

    def test_is_the_default(self, pipe):
        generate = controlnet_cases.generate
        default = generate(pipe, num_images_per_prompt=2)
        assert_close_fp32(generate(pipe, num_images_per_prompt=2, guider=ClassifierFreeGuidance(4.5)), default)
        img2img = diffusers_sana.SanaControlNetImg2ImgPipeline.from_pipe(pipe)
        options = {"image": 1 - controlnet_cases.EDGES, "num_inference_steps": 4}
        made = generate(img2img, guider=ClassifierFreeGuidance(4.5), **options)
        assert_close_fp32(made, generate(img2img, **options))

    def test_halves_alone(self, pipe):
        """Negative prompts alone, in a transformer that is not changed, and the control image of both halves."""

        def both_halves(pipe, step, timestep, tensors):
            return {"control_image": tensors["control_image"].repeat(2, 1, 1, 1)}

        callback = {
            "callback_on_step_end": both_halves,
            "callback_on_step_end_tensor_inputs": ["control_image"],
            "num_inference_steps": 3,
        }
        generate = controlnet_cases.generate
        default = generate(pipe, guidance_scale=3.0, num_inference_steps=3)
        encode = pipe.controlnet.encode_text
        with patch.object(pipe.controlnet, "encode_text", side_effect=encode) as encoding:
            guider = AutoGuidance(3.0, auto_guidance_layers=1, dropout=0.0)
            made = generate(pipe, negative_prompt="", guidance_scale=4.5, guider=guider, **callback)
        assert encoding.call_count == 2  # once for each half
        assert_close_fp32(made, default, 3e-5)


class TestStepCaches:
    def test_guidance_at_all_steps(self):
        pipe = tiny.pipeline(diffusers_sana)
        steps = {"num_inference_steps": 8}
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        default = generate(pipe, **steps)
        assert_close_fp32(generate(pipe, guider=ClassifierFreeGuidance(4.5), **steps), default)
        pipe.transformer.disable_cache()
        assert relative_error(generate(pipe, **steps), default) > 1e-4  # the cache did something

    @pytest.mark.parametrize("name", ["interval", "off", "SLG", "AutoGuidance"])
    def test_other_guiders_are_refused(self, name):
        pipe = tiny.pipeline(diffusers_sana)
        pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=8, mag_ratios=torch.ones(8)))
        with pytest.raises(ValueError, match=r"`guider`, a \w+, cannot be combined with a step cache"):
            generate(pipe, num_inference_steps=8, guider=GUIDERS[name][0]())


class TestErrors:
    @pytest.mark.parametrize("guider", [4.5, ClassifierFreeGuidance, {"guidance_scale": 4.5}], ids=str)
    def test_no_guider(self, ours, guider):
        with pytest.raises(TypeError, match="`guider` must be a guider of diffusers"):
            generate(ours, guider=guider)

    def test_for_another_model(self, ours):
        with pytest.raises(ValueError, match="`guider` must not be a LTX2Guidance"):
            generate(ours, guider=LTX2Guidance(4.5))

    def test_with_guidance_scale(self, ours):
        with pytest.raises(ValueError, match=r"`guidance_scale` must not be given with `guider`.*got 3.0"):
            generate(ours, guider=ClassifierFreeGuidance(4.5), guidance_scale=3.0)

    def test_pipelines_without_it(self, ours):
        pag = diffusers_sana.SanaPAGPipeline.from_pipe(ours)
        with pytest.raises(TypeError, match="unexpected keyword argument 'guider'"):
            generate(pag, guider=ClassifierFreeGuidance(4.5))
        sprint = object.__new__(diffusers_sana.SanaSprintPipeline)
        with pytest.raises(TypeError, match="unexpected keyword argument 'guider'"):
            sprint(CAT, guider=ClassifierFreeGuidance(4.5))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"indices": [2]}, r"numbers of the transformer's blocks, 0 to 1, got \[2\]"),
            ({"indices": []}, r"numbers of the transformer's blocks, 0 to 1, got \[\]"),
            ({"indices": [0], "fqn": "blocks"}, "`fqn` .* must be 'transformer_blocks' or 'auto', got 'blocks'"),
            ({"indices": [0], "skip_attention_scores": True}, "exclude each other"),
        ],
        ids=str,
    )
    def test_layers(self, ours, config, message):
        with pytest.raises(ValueError, match=message):
            generate(ours, guider=SkipLayerGuidance(skip_layer_config=LayerSkipConfig(**config)))

    def test_blur(self, ours):
        with pytest.raises(ValueError, match="`seg_blur_sigma` of `guider` must be above 0"):
            generate(ours, guider=SmoothedEnergyGuidance(seg_blur_sigma=0.0, seg_guidance_layers=0))

    def test_without_text_encoder(self, ours):
        embeds, mask, *_ = ours.encode_prompt(CAT)
        pipe = diffusers_sana.SanaPipeline(**ours.components | {"tokenizer": None, "text_encoder": None})
        features = {"prompt": None, "negative_prompt": "", "prompt_embeds": embeds, "prompt_attention_mask": mask}
        with pytest.raises(ValueError, match=r"`negative_prompt_embeds` must be given.*without a `guider`"):
            generate(pipe, guider=ClassifierFreeGuidance(4.5), **features)

    def test_recorded_or_compiled_code(self):
        pipe = tiny.pipeline(diffusers_sana)
        pipe.enable_cuda_graphs()
        with pytest.raises(RuntimeError, match=r"`guider`, a SkipLayerGuidance, .* with `enable_cuda_graphs`"):
            generate(pipe, guider=GUIDERS["SLG"][0]())
        pipe.disable_cuda_graphs()
        pipe.transformer.transformer_blocks[0].compile()
        with pytest.raises(RuntimeError, match=r"`guider`, a SkipLayerGuidance, .* with `torch.compile`"):
            generate(pipe, guider=GUIDERS["SLG"][0]())

    def test_parts_of_an_image(self):
        pipe = tiny.pipeline(diffusers_sana)
        message = r"`guider`, a SmoothedEnergyGuidance, .* `enable_parallelism`"
        with (
            patch.object(pipe.transformer, "_parallel_config", object(), create=True),
            pytest.raises(ValueError, match=message),
        ):
            generate(pipe, guider=GUIDERS["SEG"][0]())


def test_groups_of_layers_that_are_offloaded(ours):
    """The layer that is skipped runs for its hooks."""
    pipe = tiny.pipeline(diffusers_sana)
    device = torch.device("cpu")
    pipe.transformer.enable_group_offload(device, device, "block_level", num_blocks_per_group=1)
    ran = []
    handle = pipe.transformer.transformer_blocks[1].attn2.register_forward_hook(lambda *_: ran.append(1))
    for name in ("SLG", "PAG"):
        expected = generate(ours, guider=GUIDERS[name][0]())
        ran.clear()
        assert_close_fp32(generate(pipe, guider=GUIDERS[name][0]()), expected)
        assert len(ran) == STEPS + 2
    handle.remove()
    assert any(
        isinstance(getattr(block, "_diffusers_hook", None), HookRegistry) for block in pipe.transformer.modules()
    )


def test_blur_keeps_dtype_and_mean():
    tokens = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    for sigma in (0.7, 1e4, float("inf")):
        out = blurred(tokens, (2, 3), sigma)
        assert out.dtype == torch.bfloat16
        assert out.shape == tokens.shape
    assert_close_fp32(out.float()[:, 0], tokens.float().mean(dim=1), tolerance=1e-2)
    assert torch.equal(blurred(tokens, (1, 6), 1e-3), tokens)
