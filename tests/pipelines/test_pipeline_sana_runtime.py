"""What happens around the denoising loop: callbacks, progress, offloading, caches, adapters, memory."""

from functools import partial

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.callbacks import SDCFGCutoffCallback
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

import diffusers_sana
from diffusers_sana.pipelines import decoding
from tests import tiny
from tests.numerics import assert_close_fp32


STEPS = 3

generate = partial(tiny.generate, num_inference_steps=STEPS, height=32, width=32, use_resolution_binning=False)


@pytest.fixture
def pipe():
    return tiny.pipeline(diffusers_sana)


class TestCallback:
    def test_gets_what_it_asked_for(self, ours):
        calls = []

        def callback(pipe, step, timestep, tensors):
            calls.append((pipe, step, int(timestep), {name: tuple(value.shape) for name, value in tensors.items()}))
            return tensors

        names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
        plain = generate(ours)
        assert torch.equal(
            generate(ours, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names), plain
        )
        text = (1, 300, tiny.TEXT_WIDTH)
        shapes = {"latents": (1, 4, 16, 16), "prompt_embeds": text, "negative_prompt_embeds": text}
        ours.scheduler.set_timesteps(STEPS)
        assert [call[1:] for call in calls] == [
            (step, int(t), shapes) for step, t in enumerate(ours.scheduler.timesteps)
        ]
        assert all(call[0] is ours for call in calls)

    def test_may_return_nothing(self, ours):
        assert torch.equal(generate(ours, callback_on_step_end=lambda *args: None), generate(ours))

    def test_replaces_latents(self, ours):
        zero_at_the_end = generate(
            ours,
            callback_on_step_end=lambda pipe, step, t, tensors: {"latents": torch.zeros_like(tensors["latents"])},
        )
        assert torch.equal(zero_at_the_end, torch.zeros_like(zero_at_the_end))

    @pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
    def test_replaces_texts(self, ours, name):
        """diffusers ignores a new `negative_prompt_embeds`; the projections made before the first step must go."""
        embeds, mask, _, _ = ours.encode_prompt("a dog", do_classifier_free_guidance=False)
        masks = ours.encode_prompt("a cat")[1::2]
        assert torch.equal(masks[0], mask)  # as many tokens: a callback cannot replace the mask
        other = embeds if name == "prompt_embeds" else -ours.encode_prompt("")[2]

        def at_step(chosen):
            return lambda pipe, step, t, tensors: {name: other} if step == chosen else None

        plain = generate(ours)
        assert torch.equal(generate(ours, callback_on_step_end=at_step(STEPS - 1)), plain)  # too late for this run
        assert (generate(ours, callback_on_step_end=at_step(0)) - plain).norm() > 1e-3

        # With a solver without memory, the rest of the run is a run with the other text from the same latents on.
        euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = diffusers_sana.SanaPipeline(**ours.components | {"scheduler": euler})
        pipe.set_progress_bar_config(disable=True)
        seen = []
        replaced = generate(
            pipe,
            callback_on_step_end=lambda _, step, t, tensors: (
                seen.append(tensors["latents"]) or ({name: other} if step == 0 else None)
            ),
        )
        given = {name: other, name.replace("embeds", "attention_mask"): masks[name == "negative_prompt_embeds"]}
        begun = generate(
            pipe,
            **given | {"prompt": None if name == "prompt_embeds" else "a cat"},
            callback_on_step_end=lambda _, step, t, tensors: {"latents": seen[0]} if step == 0 else None,
        )
        assert_close_fp32(replaced, begun)

    def test_official_callback_that_ends_guidance(self, ours):
        rows = []
        forward = ours.transformer.forward

        def count(hidden_states, **kwargs):
            rows.append(len(hidden_states))
            return forward(hidden_states, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ours.transformer, "forward", count)
            callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
            assert generate(ours, callback_on_step_end=callback).isfinite().all()
        assert rows == [2, 2, 1]

    def test_interrupts(self, ours):
        steps = []

        def callback(pipe, step, t, tensors):
            steps.append(tensors["latents"])
            pipe._interrupt = step == 1

        out = generate(ours, callback_on_step_end=callback, num_inference_steps=5)
        assert len(steps) == 2
        assert torch.equal(out, steps[-1])
        assert generate(ours).isfinite().all()
        assert not ours.interrupt


def test_progress_bar(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    generate(pipe)
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


class _NoSynchronisation(TorchDispatchMode):
    """Refuses to read a value of a tensor, which on an accelerator waits for everything before it."""

    active = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.active and func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} between the steps")
        return func(*args, **kwargs or {})


def test_loop_does_not_synchronise(pipe, monkeypatch):
    mode, forward, steps = _NoSynchronisation(), pipe.transformer.forward, []

    def first_call_begins_the_loop(*args, **kwargs):
        mode.active = True
        steps.append(1)
        return forward(*args, **kwargs)

    step_guided = type(pipe.scheduler).step_guided

    def last_call_ends_it(scheduler, *args, **kwargs):
        out = step_guided(scheduler, *args, **kwargs)
        mode.active = len(steps) < STEPS
        return out

    monkeypatch.setattr(pipe.transformer, "forward", first_call_begins_the_loop)
    monkeypatch.setattr(type(pipe.scheduler), "step_guided", last_call_ends_it)
    with mode:
        generate(pipe, output_type="pt")
    assert len(steps) == STEPS


def test_text_is_projected_once(pipe):
    calls = []
    pipe.transformer.caption_projection.register_forward_hook(lambda *args: calls.append(1))
    generate(pipe)
    assert len(calls) == 1


def test_model_offload(pipe, ours):
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert_close_fp32(generate(pipe, output_type="pt"), generate(ours, output_type="pt"))


def test_offload_from_an_accelerator(pipe, ours, offload):
    expected = generate(ours, output_type="pt")
    getattr(pipe, offload)()
    for _ in range(2):
        assert_close_fp32(generate(pipe, output_type="pt").cpu(), expected, tolerance=1e-2)
    assert pipe.transformer.proj_out.weight.device.type in ("cpu", "meta")


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
def test_group_offload(pipe, ours, options):
    expected = generate(ours, output_type="pt")
    cpu = torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, num_blocks_per_group=1, **options)
    assert_close_fp32(generate(pipe, output_type="pt"), expected)


def test_step_cache(pipe, ours):
    blocks = []
    pipe.transformer.transformer_blocks[1].attn1.register_forward_hook(lambda *args: blocks.append(1))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    for _ in range(2):  # the state of one image must not reach the next
        blocks.clear()
        assert generate(pipe, num_inference_steps=5).isfinite().all()
        assert len(blocks) == 1
    pipe.transformer.disable_cache()
    assert_close_fp32(generate(pipe), generate(ours))


class TestLora:
    @pytest.fixture
    def file(self, tmp_path):
        model = tiny.transformer(diffusers)
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"]))
        torch.manual_seed(5)
        layers = {}
        for name, value in model.state_dict().items():
            if "lora" in name:
                layers[name.replace(".default", "")] = torch.randn_like(value)
        diffusers.SanaPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
        return tmp_path

    def test_equals_diffusers_and_comes_off(self, pipe, file):
        upstream, plain = tiny.pipeline(diffusers), generate(pipe)
        for each in (pipe, upstream):
            each.load_lora_weights(file, adapter_name="a")
        with_lora = generate(pipe)
        assert (with_lora - plain).norm() > 1e-2
        assert_close_fp32(with_lora, generate(upstream))

        half = generate(pipe, attention_kwargs={"scale": 0.5})
        assert_close_fp32(half, generate(upstream, attention_kwargs={"scale": 0.5}))
        assert (half - with_lora).norm() > 1e-3
        assert_close_fp32(generate(pipe), with_lora)
        pipe.set_adapters("a", 0.5)
        assert_close_fp32(generate(pipe), half)

        pipe.set_adapters("a", 1.0)
        pipe.fuse_lora()
        assert_close_fp32(generate(pipe), with_lora, tolerance=1e-4)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        assert_close_fp32(generate(pipe), plain, tolerance=1e-4)

    def test_two_adapters(self, pipe, file):
        plain = generate(pipe)
        pipe.load_lora_weights(file, adapter_name="a")
        pipe.load_lora_weights(file, adapter_name="b")
        pipe.set_adapters(["a", "b"], [1.0, -1.0])
        assert_close_fp32(generate(pipe), plain, tolerance=1e-4)
        assert pipe.get_active_adapters() == ["a", "b"]


class TestDecoding:
    """The autoencoder goes to tiles by itself, and an image that does not fit is not the end."""

    def tiled_calls(self, pipe, monkeypatch, fail=lambda tiled: False):
        calls, decode = [], pipe.vae.decode

        def watched(*args, **kwargs):
            calls.append((pipe.vae.use_tiling, pipe.vae.use_slicing))
            if fail(pipe.vae.use_tiling):
                raise torch.OutOfMemoryError("tried to allocate 80 GiB")
            return decode(*args, **kwargs)

        monkeypatch.setattr(pipe.vae, "decode", watched)
        return calls

    def test_tiles_large_images_only(self, pipe, monkeypatch):
        calls = self.tiled_calls(pipe, monkeypatch)
        plain = generate(pipe, output_type="pt")
        monkeypatch.setattr(decoding, "TILING_SIZE", 32)
        assert_close_fp32(generate(pipe, output_type="pt"), plain)
        assert calls == [(False, False), (True, False)]
        assert not pipe.vae.use_tiling

    def test_leaves_the_setting_of_the_user(self, pipe, monkeypatch):
        calls = self.tiled_calls(pipe, monkeypatch)
        pipe.vae.enable_tiling()
        generate(pipe, output_type="pt")
        assert calls == [(True, False)]
        assert pipe.vae.use_tiling

    def test_shows_the_tiles(self, pipe, capsys):
        pipe.set_progress_bar_config(disable=False)
        plain = generate(pipe, output_type="pt")
        assert "tiles" not in capsys.readouterr().err
        smallest = pipe.vae._tile_margin() // 32 * 32 + 32
        pipe.vae.enable_tiling(smallest, smallest)
        latents = torch.randn(1, 4, 2 * smallest // pipe.vae_scale_factor, smallest // pipe.vae_scale_factor)
        with torch.no_grad():
            tiled = pipe._decode(latents)
        shown = capsys.readouterr().err
        assert "tiles: 100%" in shown
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            assert torch.equal(pipe._decode(latents), tiled)
        assert not capsys.readouterr().err
        assert plain.isfinite().all()

    @pytest.mark.parametrize("library", [diffusers_sana, diffusers], ids=["ours", "diffusers"])
    def test_out_of_memory_is_tried_again_in_tiles(self, pipe, ours, library, monkeypatch):
        # diffusers warns, and then dies of an unbound variable.
        pipe.vae = tiny.vae(library)
        calls = self.tiled_calls(pipe, monkeypatch, fail=lambda tiled: not tiled)
        assert_close_fp32(generate(pipe, output_type="pt"), generate(ours, output_type="pt"))
        assert calls == [(False, False), (True, True)]
        assert (pipe.vae.use_tiling, pipe.vae.use_slicing) == (False, False)

    def test_out_of_memory_for_good(self, pipe, monkeypatch):
        self.tiled_calls(pipe, monkeypatch, fail=lambda tiled: True)
        with pytest.raises(torch.OutOfMemoryError, match=r"does not fit even image by image.*output_type='latent'"):
            generate(pipe, output_type="pt")
        assert (pipe.vae.use_tiling, pipe.vae.use_slicing) == (False, False)


def test_compiled_transformer(pipe, ours):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    assert_close_fp32(generate(pipe, num_inference_steps=1), generate(ours, num_inference_steps=1))
