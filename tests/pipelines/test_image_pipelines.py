"""What the pipelines that begin with an image share with `SanaPipeline`: components, folders, and what runs them."""

import json

import diffusers
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_INPAINT_PIPELINES_MAPPING
from peft import LoraConfig

import diffusers_sana
from tests import tiny
from tests.numerics import assert_close_fp32


AUTO = {
    "SanaPipeline": diffusers.AutoPipelineForText2Image,
    "SanaImg2ImgPipeline": diffusers.AutoPipelineForImage2Image,
    "SanaInpaintPipeline": diffusers.AutoPipelineForInpainting,
}
NAMES = tuple(AUTO)[1:]
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 8:20, 8:20] = 1


def generate(pipe, **kwargs):
    masked = {"mask_image": MASK} if type(pipe).__name__ == "SanaInpaintPipeline" else {}
    return tiny.generate(pipe, image=IMAGE, **masked, **{"num_inference_steps": 4, "strength": 0.75} | kwargs)


@pytest.fixture(params=NAMES)
def cls(request):
    return getattr(diffusers_sana, request.param)


@pytest.fixture
def pipe(cls):
    return cls.from_pipe(tiny.pipeline(diffusers_sana))


@pytest.fixture
def plain(cls, ours):
    return generate(cls.from_pipe(ours))


class TestFromPipe:
    @pytest.mark.parametrize("there", AUTO)
    @pytest.mark.parametrize("here", AUTO)
    def test_shares_the_components_as_they_are(self, here, there):
        parts = tiny.components(diffusers_sana)
        parts["transformer"].to(torch.bfloat16)
        pipe = getattr(diffusers_sana, here)(**parts)
        pipe.register_to_config(_name_or_path="a/checkpoint")
        pipe.set_progress_bar_config(disable=True)
        other = getattr(diffusers_sana, there).from_pipe(pipe)
        auto = AUTO[there].from_pipe(pipe)
        assert type(other) is type(auto) is getattr(diffusers_sana, there)
        for name, part in parts.items():
            assert getattr(other, name) is getattr(auto, name) is part
        assert other.transformer.dtype == torch.bfloat16
        assert other.vae.dtype == torch.float32
        assert other.config._name_or_path == "a/checkpoint"
        assert other._progress_bar_config == {"disable": True}

    def test_components_of_diffusers(self, cls, upstream, plain):
        pipe = cls.from_pipe(upstream)
        assert pipe.transformer is upstream.transformer
        assert_close_fp32(generate(pipe), plain, tolerance=1e-4)

    def test_with_another_component_and_dtype(self, cls):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = cls.from_pipe(tiny.pipeline(diffusers_sana), scheduler=scheduler, dtype=torch.bfloat16)
        assert pipe.scheduler is scheduler
        assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
        assert generate(pipe).isfinite().all()

    def test_refused(self, cls, ours):
        with pytest.raises(ValueError, match="`unet`: no component of Sana"):
            cls.from_pipe(ours, unet=None)
        ddpm = diffusers.DDPMPipeline(unet=None, scheduler=ours.scheduler)
        with pytest.raises(ValueError, match=r"also needs `text_encoder`, `tokenizer`, .*which DDPMPipeline lacks"):
            cls.from_pipe(ddpm)


class TestFolders:
    def test_official_folder(self, cls, official_folder, plain):
        for pipe in (cls.from_pretrained(official_folder), AUTO[cls.__name__].from_pretrained(official_folder)):
            assert type(pipe) is cls
            assert type(pipe.transformer) is diffusers_sana.SanaTransformer2DModel
            assert_close_fp32(generate(pipe), plain)

    def test_saved_folder_loads_again(self, cls, ours, tmp_path, plain):
        cls.from_pipe(ours).save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["_class_name"] == cls.__name__
        assert index["transformer"] == ["diffusers", "SanaTransformer2DModel"]
        for loader in (cls, diffusers.DiffusionPipeline, AUTO[cls.__name__]):
            pipe = loader.from_pretrained(tmp_path)
            assert type(pipe) is cls
            assert_close_fp32(generate(pipe), plain)
        assert type(diffusers_sana.SanaPipeline.from_pretrained(tmp_path)) is diffusers_sana.SanaPipeline


class TestRuntime:
    def test_callback_sees_and_replaces(self, pipe):
        calls = []

        def callback(pipe, step, timestep, tensors):
            calls.append((step, sorted(tensors)))
            return {"latents": torch.zeros_like(tensors["latents"])}

        names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
        latents = generate(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
        assert calls == [(step, sorted(names)) for step in range(3)]
        assert not latents.any()

    def test_callback_of_diffusers(self, pipe, plain):
        cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
        assert not torch.equal(generate(pipe, callback_on_step_end=cutoff), plain)

    def test_interrupt(self, pipe):
        steps = []

        def callback(pipe, step, timestep, tensors):
            steps.append(step)
            pipe._interrupt = True

        generate(pipe, callback_on_step_end=callback)
        assert steps == [0]

    def test_lora(self, pipe, plain):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        assert not torch.equal(generate(pipe), plain)
        assert torch.equal(generate(pipe, attention_kwargs={"scale": 0.0}), plain)

    def test_four_bits(self, pipe, plain):
        diffusers_sana.quantize(pipe, diffusers_sana.SVDQuantConfig(rank=4), progress=False)
        latents = generate(pipe)
        assert latents.isfinite().all()
        assert not torch.equal(latents, plain)
        assert torch.equal(generate(pipe), latents)

    def test_offload(self, pipe):
        expected = generate(pipe, output_type="pt")
        pipe.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            assert_close_fp32(generate(pipe, output_type="pt"), expected)

    def test_offload_from_an_accelerator(self, pipe, offload):
        expected = generate(pipe, output_type="pt")
        getattr(pipe, offload)()
        for _ in range(2):
            assert_close_fp32(generate(pipe, output_type="pt").cpu(), expected, tolerance=1e-2)

    def test_half_precision(self, pipe, plain):
        for name in ("vae", "transformer", "text_encoder"):
            getattr(pipe, name).to(torch.bfloat16)
        latents = generate(pipe)
        assert latents.dtype == torch.float32
        assert_close_fp32(latents, plain, tolerance=0.1)

    def test_encodes_in_tiles_where_one_piece_is_too_large(self, pipe, plain, monkeypatch):
        tiled, encode = [], pipe.vae.encode

        def scarce(*args, **kwargs):
            tiled.append((pipe.vae.use_tiling, pipe.vae.use_slicing))
            if not pipe.vae.use_tiling:
                raise torch.OutOfMemoryError("tried to allocate 80 GiB")
            return encode(*args, **kwargs)

        monkeypatch.setattr(pipe.vae, "encode", scarce)
        assert_close_fp32(generate(pipe), plain)
        assert tiled == [(False, False), (True, True)]
        assert not pipe.vae.use_tiling


def test_unregistered():
    tables = AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_INPAINT_PIPELINES_MAPPING
    assert [next(iter(table.values())).__name__ for table in tables] == list(NAMES)
    diffusers_sana.unregister()
    try:
        for table in tables:
            assert not any("diffusers_sana" in cls.__module__ for cls in table.values())
        for name in NAMES:
            assert not hasattr(diffusers, name)
    finally:
        diffusers_sana.register()
