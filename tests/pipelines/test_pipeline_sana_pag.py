"""`SanaPAGPipeline` makes what diffusers' makes, also where that one leaves something out: norms, adapters, 4 bits."""

import inspect
from functools import lru_cache

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.pipelines import pipeline_utils
from peft import LoraConfig
from torch import nn

import diffusers_sana
from diffusers_sana import SanaPipeline, SVDQuantConfig, quantize
from diffusers_sana.models.transformers.attention_sana import SanaLinearAttnProcessor, SanaPAGAttnProcessor
from diffusers_sana.pipelines.pipeline_sana_pag import SanaPAGPipeline
from diffusers_sana.pipelines.request import Request
from tests import tiny
from tests.numerics import assert_close_fp32


CAT, DOG = "A cat, sleeping", "a dog that has eaten too much"
QK_NORM = {"qk_norm": "rms_norm_across_heads"}


def generate(pipe, prompt=CAT, **kwargs):
    settings = {"num_inference_steps": 3, "height": 32, "width": 32, "use_resolution_binning": False}
    return tiny.generate(pipe, prompt, **settings | kwargs)


def pag(library=diffusers_sana, pag_applied_layers="transformer_blocks.0", **changes):
    pipeline_class = SanaPAGPipeline if library is diffusers_sana else diffusers.SanaPAGPipeline
    pipe = pipeline_class(**tiny.components(library, **changes), pag_applied_layers=pag_applied_layers)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return pag()


@lru_cache
def shared(library=diffusers_sana):
    """One for all tests that do not change it."""
    return pag(library)


def processors(pipe):
    return list(map(type, pipe.transformer.attn_processors.values()))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"guidance_scale": 1.0},
        {"pag_scale": 1.5, "negative_prompt": "ugly"},
        {"pag_adaptive_scale": 0.01},  # nothing is left below 700
        {"prompt": [CAT, DOG], "negative_prompt": ["ugly", "a very dark photograph"]},
        {"prompt": ["", DOG], "guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"pag_scale": 0.0},
        {"output_type": "pt"},
    ],
    ids=str,
)
def test_equals_diffusers(kwargs):
    assert_close_fp32(generate(shared(), **kwargs), generate(shared(diffusers), **kwargs), tolerance=1e-5)


def test_equals_diffusers_with_several_layers():
    layers = ["transformer_blocks.0", "transformer_blocks.2"]
    ours, theirs = (pag(library, layers, num_layers=3) for library in (diffusers_sana, diffusers))
    assert_close_fp32(generate(ours), generate(theirs), tolerance=1e-5)


def test_runs_components_of_diffusers():
    pipe = SanaPAGPipeline.from_pipe(shared(diffusers))
    assert type(pipe.transformer) is diffusers.SanaTransformer2DModel
    assert_close_fp32(generate(pipe), generate(shared()))
    assert not any(name is SanaPAGAttnProcessor for name in processors(pipe))


class TestFormula:
    """Against one step computed by hand from three plain calls of the transformer."""

    @torch.no_grad()
    def by_hand(self, pipe, guidance_scale=4.5, pag_scale=3.0, block=0):
        """The velocity of the first step, with a transformer whose block has no self-attention for p."""
        embeds, mask, negative, negative_mask = pipe.encode_prompt(CAT)
        noise = torch.randn(1, tiny.LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(3))
        pipe.scheduler.set_timesteps(1)
        t = pipe.scheduler.timesteps

        def velocity(text, mask):
            return pipe.transformer(noise, text, t, encoder_attention_mask=mask, return_dict=False)[0]

        u, c = velocity(negative, negative_mask), velocity(embeds, mask)
        attention = pipe.transformer.transformer_blocks[block].attn1
        forward = attention.forward
        attention.forward = lambda x: attention.to_out[1](attention.to_out[0](attention.to_v(x)))
        p = velocity(embeds, mask)
        attention.forward = forward
        assert (c - p).norm() > 1e-3 * c.norm()
        v = u + guidance_scale * (c - u) if guidance_scale > 1 else c
        return noise - pipe.scheduler.sigmas[0] * (v + pag_scale * (c - p))

    @pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
    @pytest.mark.parametrize("changes", [{}, QK_NORM], ids=["sana", "sana-1.5"])
    def test_one_step(self, changes, guidance_scale):
        pipe = pag(**changes)
        if changes:  # all ones as initialized, which hides norms in the wrong place
            for block in pipe.transformer.transformer_blocks:
                nn.init.normal_(block.attn1.norm_q.weight)
                nn.init.normal_(block.attn1.norm_k.weight)
        made = generate(pipe, num_inference_steps=1, guidance_scale=guidance_scale)
        assert_close_fp32(made, self.by_hand(pipe, guidance_scale))

    def test_lora(self, pipe):
        plain = generate(pipe, num_inference_steps=1)
        lora = LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
        pipe.transformer.add_adapter(lora)
        adapted = generate(pipe, num_inference_steps=1)
        assert_close_fp32(adapted, self.by_hand(pipe))
        assert (adapted - plain).norm() > 1e-2
        off = generate(pipe, num_inference_steps=1, attention_kwargs={"scale": 0.0})
        assert_close_fp32(off, plain, tolerance=1e-5)

    def test_lora_file(self, pipe, tmp_path):
        """diffusers' pipeline has no LoRA loader."""
        model = tiny.transformer(diffusers)
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_v"], init_lora_weights=False))
        layers = {key.replace(".default", ""): value for key, value in model.state_dict().items() if "lora" in key}
        SanaPAGPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
        plain = generate(pipe, num_inference_steps=1)
        pipe.load_lora_weights(tmp_path)
        assert_close_fp32(generate(pipe, num_inference_steps=1), self.by_hand(pipe))
        pipe.unload_lora_weights()
        assert_close_fp32(generate(pipe, num_inference_steps=1), plain)

    @pytest.mark.parametrize("prompts", [None, [CAT, DOG]], ids=["without data", "calibrated"])
    def test_four_bits(self, prompts):
        pipe = pag(num_layers=1)
        plain = generate(pipe, num_inference_steps=1)
        size = {"height": 32, "width": 32, "num_inference_steps": 1} if prompts else {}
        quantize(pipe, SVDQuantConfig(rank=4), prompts=prompts, progress=False, **size)
        quantized = generate(pipe, num_inference_steps=1)
        # Activations are quantized too, token by token; a rounding that falls otherwise is a difference.
        assert_close_fp32(quantized, self.by_hand(pipe), tolerance=1e-3)
        assert 1e-3 < (quantized - plain).norm() / plain.norm() < 0.5


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_images_of_a_batch_equal_single_images(guidance_scale):
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    options = {"guidance_scale": guidance_scale, "pag_adaptive_scale": 0.001}
    batch = generate(
        shared(), [CAT, DOG], negative_prompt=["x", "yyy"], num_images_per_prompt=2, generator=generators, **options
    )
    for index, (prompt, negative) in enumerate([(CAT, "x"), (CAT, "x"), (DOG, "yyy"), (DOG, "yyy")]):
        single = generate(shared(), prompt, seed=index, negative_prompt=negative, **options)
        assert_close_fp32(batch[index : index + 1], single)


@pytest.mark.parametrize("changes", [{"pag_scale": 0}, {"pag_applied_layers": []}], ids=str)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_without_it_the_bits_of_the_plain_pipeline(ours, changes, guidance_scale):
    made = generate(shared(), [CAT, DOG], guidance_scale=guidance_scale, **changes)
    assert torch.equal(made, generate(ours, [CAT, DOG], guidance_scale=guidance_scale))
    assert not shared().do_perturbed_attention_guidance


def test_same_seed_same_bits():
    assert torch.equal(generate(shared()), generate(shared()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, pipe):
    pipe.transformer.to(dtype)
    assert_close_fp32(generate(pipe), generate(shared()), tolerance=0.1)


def test_saturates_in_half_precision(pipe):
    attention = pipe.transformer.transformer_blocks[0].attn1.half()
    nn.init.constant_(attention.to_v.weight, 100)
    nn.init.constant_(attention.to_out[0].weight, 100)
    with torch.no_grad():
        out = SanaPAGAttnProcessor(attention.processor, 1)(attention, torch.ones(2, 3, 16).half())
    assert torch.equal(out, torch.full_like(out, 65504))


class TestLayers:
    @pytest.fixture(scope="class")
    @classmethod
    def deep(cls):
        return pag(num_layers=12, pag_applied_layers="transformer_blocks.1")

    def perturbed(self, pipe, **kwargs):
        """The blocks that are perturbed in the transformer's forward."""
        seen = []

        def look(transformer, args):
            seen.append(
                [
                    int(name.split(".")[1])
                    for name, processor in transformer.attn_processors.items()
                    if isinstance(processor, SanaPAGAttnProcessor)
                ]
            )

        handle = pipe.transformer.register_forward_pre_hook(look)
        generate(pipe, num_inference_steps=1, **kwargs)
        handle.remove()
        return seen[0]

    @pytest.mark.parametrize(
        ("layers", "blocks"),
        [
            (None, [1]),  # and not 10 and 11, as diffusers would
            (8, [8]),
            ([10, 3], [3, 10]),
            ((2, "transformer_blocks.2.attn1"), [2]),
            ("transformer_blocks.11", [11]),
            ("transformer_blocks", list(range(12))),
            ("attn1", list(range(12))),
            ([], []),
        ],
        ids=str,
    )
    def test_are_the_named_ones(self, deep, layers, blocks):
        assert self.perturbed(deep, pag_applied_layers=layers) == blocks
        assert deep.pag_applied_layers == ["transformer_blocks.1"]

    @pytest.mark.parametrize(
        "layers", ["blocks.1", "transformer_blocks.(1|2)", "transformer_blocks.1.attn2", "", 12, -1, ["attn1", "x"]]
    )
    def test_unknown(self, deep, layers):
        with pytest.raises(ValueError, match=r"`pag_applied_layers` must be .*transformer_blocks\.11\.attn1"):
            generate(deep, pag_applied_layers=layers)
        with pytest.raises(ValueError, match="`pag_applied_layers` must be"):
            deep.set_pag_applied_layers(layers)
        assert deep.pag_applied_layers == ["transformer_blocks.1"]

    @pytest.mark.parametrize("layers", [1.5, [None], {1}])
    def test_of_another_type(self, deep, layers):
        with pytest.raises(TypeError, match="`pag_applied_layers` must be the number or the name"):
            generate(deep, pag_applied_layers=layers)

    def test_default_is_that_of_diffusers(self):
        ours, theirs = (inspect.signature(each.__init__) for each in (SanaPAGPipeline, diffusers.SanaPAGPipeline))
        assert str(ours.parameters["pag_applied_layers"]).endswith("= 'transformer_blocks.0'")
        more = ["image_encoder", "feature_extractor", "ip_adapter"]
        assert list(ours.parameters) == [*theirs.parameters, *more]
        assert ours.parameters["pag_applied_layers"].default == theirs.parameters["pag_applied_layers"].default


def test_signature_is_that_of_the_plain_pipeline_and_more():
    ours, plain, theirs = (
        inspect.signature(each.__call__).parameters
        for each in (SanaPAGPipeline, SanaPipeline, diffusers.SanaPAGPipeline)
    )
    last = ["share_prompt_mask", "ip_adapter_image", "ip_adapter_image_embeds"]
    common = [name for name in plain if name not in ("guider", *last)]
    assert list(ours) == [*common, "pag_scale", "pag_adaptive_scale", "pag_applied_layers", *last]
    assert theirs.keys() - {"kwargs"} <= ours.keys()
    assert all(ours[name] == plain[name] for name in [*common, *last])
    assert all(ours[name].default == theirs[name].default for name in ("pag_scale", "pag_adaptive_scale"))


def test_every_argument_is_passed_on(monkeypatch):
    """Also those that the other tests leave at their defaults."""
    names = inspect.signature(SanaPipeline.__call__).parameters.keys() - {"self", "guider"}
    marks = {name: object() for name in names}
    marks["attention_kwargs"] = {"scale": 0.5}
    collected = []
    monkeypatch.setattr(Request, "_check", lambda request, has_vae: collected.append(request))
    monkeypatch.setattr(shared(), "_sizes", lambda request: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shared()(**marks)
    assert {name: getattr(collected[0], name) for name in marks} == marks


@pytest.mark.parametrize("name", ["pag_scale", "pag_adaptive_scale"])
def test_wrong_scales(name):
    with pytest.raises(TypeError, match=f"`{name}` must be a number, got '3'"):
        generate(shared(), **{name: "3"})
    for value, message in ((-1, "not be negative"), (float("nan"), "be finite")):
        with pytest.raises(ValueError, match=f"`{name}` must {message}"):
            generate(shared(), **{name: value})


class TestProcessors:
    """Whatever happens, the transformer is afterwards as it was, and other pipelines may have it."""

    def test_are_restored(self, pipe, ours):
        before = pipe.transformer.attn_processors
        plain = SanaPipeline.from_pipe(pipe)
        generate(pipe)
        assert pipe.transformer.attn_processors == before
        assert torch.equal(generate(plain), generate(ours))

    def test_are_restored_after_an_error(self, pipe):
        before = pipe.transformer.attn_processors

        def stop(module, args):
            assert any(name is SanaPAGAttnProcessor for name in processors(pipe))
            raise KeyboardInterrupt

        handle = pipe.transformer.proj_out.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe)
        handle.remove()
        assert pipe.transformer.attn_processors == before
        assert generate(pipe, pag_scale=0).isfinite().all()

    def test_of_the_user_stay_in_use(self, pipe):
        """Also one that is a module."""

        class Doubling(nn.Module):
            def forward(self, attn, hidden_states):
                return 2 * SanaLinearAttnProcessor()(attn, hidden_states)

        own = Doubling()
        pipe.transformer.transformer_blocks[0].attn1.set_processor(own)
        doubled = generate(pipe, num_inference_steps=1)
        assert pipe.transformer.transformer_blocks[0].attn1.processor is own
        assert (doubled - generate(shared(), num_inference_steps=1)).norm() > 1e-3
        assert_close_fp32(doubled, TestFormula().by_hand(pipe))

    def test_are_equal_for_equal_calls(self):
        one = SanaLinearAttnProcessor()
        assert SanaPAGAttnProcessor(one, 2) == SanaPAGAttnProcessor(one, 2)
        assert SanaPAGAttnProcessor(one, 2) != SanaPAGAttnProcessor(one, 3)
        assert len({SanaPAGAttnProcessor(one, 2), SanaPAGAttnProcessor(one, 2)}) == 1


class TestCallbacks:
    def rows(self, pipe, **kwargs):
        """Size of the batch at each step."""
        rows = []
        handle = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        out = generate(pipe, **kwargs)
        handle.remove()
        return rows, out

    def rest(self, change, pipeline_class=SanaPAGPipeline, **options):
        """A run that `change` changes after its first of two steps, and one that is like this from the beginning.

        The other is given the latents after the first step, and the solver has no memory, so both must end alike.
        """
        components = tiny.components(diffusers_sana)
        components["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        seen = []

        def first(pipe, step, t, tensors):
            seen.append(tensors["latents"])
            return change(pipe, tensors) if step == 0 else None

        names = ["latents", "prompt_embeds"]
        arguments = {"prompt": [CAT, DOG], "num_inference_steps": 2, "callback_on_step_end_tensor_inputs": names}
        rows, changed = self.rows(SanaPAGPipeline(**components), callback_on_step_end=first, **arguments)
        expected = generate(
            pipeline_class(**components),
            **arguments | options,
            callback_on_step_end=lambda _, step, *args: {"latents": seen[0]} if step == 0 else None,
        )
        assert_close_fp32(changed, expected)
        return rows

    def test_end_of_guidance(self):
        def change(pipe, tensors):
            pipe._guidance_scale = 1.0

        assert self.rest(change, guidance_scale=1.0) == [6, 4]

    def test_end_of_perturbation(self):
        """The weight counts at once; the batch stays as it is, also where the texts are made anew."""

        def change(pipe, tensors):
            pipe._pag_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"]}

        assert self.rest(change, pipeline_class=SanaPipeline) == [6, 6]

    def test_official_callback_that_ends_guidance(self):
        cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
        rows, out = self.rows(shared(), callback_on_step_end=cutoff)
        assert rows == [3, 3, 2]
        assert out.isfinite().all()

    def test_new_texts(self, pipe):
        embeds = pipe.encode_prompt("a dog", do_classifier_free_guidance=False)[0]
        plain = generate(pipe, "a cat")
        swapped = generate(
            pipe, "a cat", callback_on_step_end=lambda _, step, *args: {"prompt_embeds": embeds} if step == 0 else None
        )
        assert (swapped - plain).norm() > 1e-3

    def test_what_they_see(self):
        shapes = []

        def callback(pipe, step, t, tensors):
            assert (pipe.pag_scale, pipe.pag_adaptive_scale) == (2.0, 0.001)
            assert pipe.do_perturbed_attention_guidance
            assert pipe.do_pag_adaptive_scaling
            shapes.append([len(value) for value in tensors.values()])

        names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
        options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
        generate(shared(), [CAT, DOG], pag_scale=2.0, pag_adaptive_scale=0.001, **options)
        assert shapes == [[2, 2, 2]] * 3

    def test_interrupt(self):
        def callback(pipe, step, t, tensors):
            pipe._interrupt = True

        assert generate(shared(), callback_on_step_end=callback).isfinite().all()
        assert not any(name is SanaPAGAttnProcessor for name in processors(shared()))


def test_text_is_projected_once(pipe):
    calls = []
    pipe.transformer.caption_projection.register_forward_hook(lambda *args: calls.append(1))
    generate(pipe)
    assert len(calls) == 1


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload(pipe, offload_type):
    cpu = torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, num_blocks_per_group=1, offload_type=offload_type)
    assert_close_fp32(generate(pipe), generate(shared()))


def test_step_cache(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    assert generate(pipe, num_inference_steps=5).isfinite().all()
    pipe.transformer.disable_cache()
    assert_close_fp32(generate(pipe), generate(shared()))


def test_compiled_transformer():
    torch._dynamo.reset()
    pipe = pag(num_layers=1)
    expected = generate(pipe, num_inference_steps=1)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    assert_close_fp32(generate(pipe, num_inference_steps=1), expected)


def test_compiled_blocks_settle(pipe):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert_close_fp32(generate(pipe), generate(shared()))
    compiled = counter.frame_count
    generate(pipe)
    assert counter.frame_count == compiled <= 2  # a block with and a block without


def test_rows_shared_among_processes_are_refused(pipe):
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(ModelHook(), "cfg_parallel")
    with pytest.raises(RuntimeError, match="`cfg_parallel` cannot be combined"):
        generate(pipe)
    assert generate(pipe, pag_scale=0).isfinite().all()


class TestFolders:
    def test_official(self, official_folder, monkeypatch):
        warnings = []
        monkeypatch.setattr(pipeline_utils.logger, "warning", warnings.append)
        loaded = SanaPAGPipeline.from_pretrained(official_folder, pag_applied_layers=[1])
        assert not warnings
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.transformer) is diffusers_sana.SanaTransformer2DModel
        assert loaded.pag_applied_layers == [1]
        expected = generate(shared(diffusers))
        assert (generate(loaded) - expected).norm() > 1e-3
        assert_close_fp32(generate(loaded, pag_applied_layers=0), expected)

    def test_saved(self, tmp_path):
        shared().save_pretrained(tmp_path)
        loaded = diffusers.SanaPAGPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.transformer) is diffusers.SanaTransformer2DModel
        assert_close_fp32(generate(loaded), generate(shared(diffusers)))
        assert type(SanaPipeline.from_pretrained(tmp_path)) is SanaPipeline
        assert type(SanaPAGPipeline.from_pretrained(tmp_path)) is SanaPAGPipeline

    def test_from_pipe(self, ours):
        made = SanaPAGPipeline.from_pipe(ours, pag_applied_layers="transformer_blocks.1")
        assert made.transformer is ours.transformer
        assert made.pag_applied_layers == ["transformer_blocks.1"]
        assert SanaPAGPipeline.from_pipe(ours).pag_applied_layers == ["transformer_blocks.0"]
        with pytest.raises(ValueError, match="`layers`: no component of SanaPAGPipeline"):
            SanaPAGPipeline.from_pipe(ours, layers=1)
