"""`VilaUPipeline`: images and videos are the model's; seeds, callbacks, folders, offloading."""

import json
import os
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from PIL import Image

import diffusers_sana
from diffusers_sana import VilaUPipeline
from tests.models.vila_u.tiny import CELLS, DEPTH, shared_model, tiny_model
from tests.models.vila_u.tiny_processor import tiny_processor, write_folders


PROMPTS = ["a cat", "a USER, a cat and a cat", "c"]  # of different lengths
GREY = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def codes_of(pipe, prompt="a cat", **kwargs):
    return pipe(prompt, output_type="latent", **{"generator": seeded(3)[0]} | kwargs).codes


@pytest.fixture(scope="module")
def pipe():
    return quiet(VilaUPipeline(shared_model(), tiny_processor()))


@pytest.fixture(scope="module")
def folders(pipe, tmp_path_factory):
    """Of a pipeline and of transformers, by kind."""
    return write_folders(pipe, tmp_path_factory.mktemp("folders"))


class TestImages:
    def test_is_generate_of_the_model(self, pipe):
        options = {"guidance_scale": 2.0, "temperature": 1.5, "top_k": 20, "top_p": 0.8}
        out = pipe(PROMPTS, negative_prompt="c", generator=seeded(1, 2, 3), output_type="pt", **options)
        inputs = pipe.processor(text=PROMPTS, generation_mode="image", negative_prompt="c")
        codes = pipe.model.generate(**inputs, generation_mode="image", generator=seeded(1, 2, 3), **options)
        assert torch.equal(out.codes, codes)
        pixels = pipe.model.decode_image_tokens(codes, chunk_size=1)
        assert torch.equal(out.images, pipe.processor.postprocess(pixels, output_type="pt"))
        assert out.frames is None
        assert pipe.num_timesteps == CELLS

    def test_options_reach_the_model(self, pipe):
        plain = codes_of(pipe)
        greedy = codes_of(pipe, do_sample=False)
        assert torch.equal(codes_of(pipe, top_k=1), greedy)
        for codes in (greedy, codes_of(pipe, guidance_scale=1.0), codes_of(pipe, negative_prompt="cat")):
            assert not torch.equal(codes, plain)
        assert torch.equal(codes_of(pipe, guidance_scale=3.0), plain)  # the default of the paper

    def test_guidance_scale_of_the_model(self, folders):
        pipe = quiet(VilaUPipeline.from_pretrained(folders["pipeline"]))
        pipe.model.generation_config.visual_guidance_scale = 1.5
        assert torch.equal(codes_of(pipe), codes_of(pipe, guidance_scale=1.5))

    def test_same_seed_same_bits_whatever_the_batch(self, pipe):
        together, again = (pipe(PROMPTS, generator=seeded(1, 2, 3), output_type="pt").images for _ in range(2))
        assert torch.equal(again, together)
        for prompt, seed, image in zip(PROMPTS, (1, 2, 3), together, strict=True):
            assert torch.equal(pipe(prompt, generator=seeded(seed), output_type="pt").images[0], image)

    def test_images_of_a_prompt_are_neighbors(self, pipe):
        codes = codes_of(pipe, PROMPTS[:2], num_images_per_prompt=2, generator=seeded(1, 2, 3, 4))
        assert codes.shape == (4, CELLS, DEPTH)
        assert torch.equal(codes[2], codes_of(pipe, PROMPTS[1], generator=seeded(3))[0])

    def test_output_types(self, pipe):
        outs = {kind: pipe("c", generator=seeded(1), output_type=kind) for kind in ("pil", "np", "pt", "latent")}
        assert outs["pil"].images[0].size == (32, 32)
        assert outs["np"].images.shape == (1, 32, 32, 3)
        assert np.allclose(outs["np"].images, outs["pt"].images.movedim(1, -1))
        assert outs["latent"].images is outs["latent"].codes
        images, codes = pipe("c", generator=seeded(1), output_type="np", return_dict=False)
        assert np.array_equal(images, outs["np"].images)
        assert torch.equal(codes, outs["np"].codes)

    def test_video(self, pipe):
        out = pipe(PROMPTS[:2], num_frames=3, generator=seeded(1, 2))
        assert out.images is None
        assert out.codes.shape == (2, 3, CELLS, DEPTH)
        assert [[frame.size for frame in video] for video in out.frames] == [[(32, 32)] * 3] * 2
        inputs = pipe.processor(text=PROMPTS[:2], generation_mode="video")
        codes = pipe.model.generate(**inputs, generation_mode="video", num_frames=3, generator=seeded(1, 2))
        assert torch.equal(out.codes, codes)


class TestCallback:
    def test_sees_the_image_grow(self, pipe):
        calls = []

        def callback(*call):
            calls.append(call)
            return call[-1]

        codes = codes_of(pipe, PROMPTS[:2], callback_on_step_end=callback)
        assert torch.equal(codes, codes_of(pipe, PROMPTS[:2]))
        assert [call[:3] for call in calls] == [(pipe, cell, cell) for cell in range(CELLS)]
        for _, cell, _, tensors in calls:
            assert list(tensors) == ["codes"]
            assert torch.equal(tensors["codes"][:, : cell + 1], codes[:, : cell + 1])
            assert (tensors["codes"][:, cell:] == codes[:, cell : cell + 1]).all()
        assert pipe.decode(calls[3][-1]["codes"])[0].size == (32, 32)

    def test_interrupts(self, pipe):
        cells = []

        def callback(pipe, cell, timestep, tensors):
            cells.append(cell)
            pipe._interrupt = cell == 5

        codes = codes_of(pipe, callback_on_step_end=callback)
        assert cells == list(range(6))
        assert pipe.interrupt
        assert torch.equal(codes[:, :6], codes_of(pipe)[:, :6])
        assert (codes[:, 5:] == codes[:, 5:6]).all()
        assert not pipe.interrupt

    def test_of_a_class(self, pipe):
        class Watch(PipelineCallback):
            tensor_inputs = ["codes"]
            seen = 0

            def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
                Watch.seen += callback_kwargs["codes"].shape[0]
                return callback_kwargs

        codes_of(pipe, callback_on_step_end=Watch())
        assert Watch.seen == CELLS

    def test_cannot_replace(self, pipe):
        with pytest.raises(ValueError, match="must not replace `codes`"):
            codes_of(pipe, callback_on_step_end=lambda *call: {"codes": call[-1]["codes"] + 1})


def test_progress_bar(folders, capsys):
    VilaUPipeline.from_pretrained(folders["pipeline"])("c")
    assert f"{CELLS}/{CELLS}" in capsys.readouterr().err


class TestFolders:
    @pytest.mark.parametrize("cls", [VilaUPipeline, diffusers.DiffusionPipeline])
    def test_pipeline_folder(self, pipe, folders, cls):
        index = json.loads((folders["pipeline"] / "model_index.json").read_text())
        assert index["_class_name"] == "VilaUPipeline"
        assert index["model"] == ["diffusers_sana", "VilaUForConditionalGeneration"]
        loaded = quiet(cls.from_pretrained(folders["pipeline"]))
        assert type(loaded) is VilaUPipeline
        assert torch.equal(codes_of(loaded), codes_of(pipe))

    def test_transformers_folder(self, pipe, folders):
        loaded = quiet(VilaUPipeline.from_pretrained(folders["transformers"]))
        assert torch.equal(codes_of(loaded), codes_of(pipe))
        assert loaded.name_or_path == str(folders["transformers"])

    def test_transformers_checkpoint_in_the_cache_of_the_hub(self, pipe, folders, tmp_path):
        repository, commit = tmp_path / "models--some--vila-u", "0" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(folders["transformers"], repository / "snapshots" / commit)
        loaded = VilaUPipeline.from_pretrained("some/vila-u", cache_dir=tmp_path, local_files_only=True)
        assert torch.equal(codes_of(quiet(loaded)), codes_of(pipe))

    @pytest.mark.parametrize("kind", ["pipeline", "transformers"])
    def test_dtypes_and_passed_components(self, pipe, folders, kind):
        for dtype in (torch.bfloat16, {"model": torch.float16}):
            loaded = quiet(VilaUPipeline.from_pretrained(folders[kind], dtype=dtype))
            assert loaded.dtype == (dtype["model"] if isinstance(dtype, dict) else dtype)
            assert codes_of(loaded).unique().numel() > 10
            assert isinstance(loaded.chat(GREY, "cat?", max_new_tokens=2), str)
        given = {"model": pipe.model, "processor": pipe.processor}
        assert VilaUPipeline.from_pretrained(folders[kind], **given).components == given

    def test_unregistered(self, folders):
        diffusers.DiffusionPipeline.from_pretrained(folders["pipeline"], model=shared_model())
        diffusers_sana.unregister()
        try:
            with pytest.raises(AttributeError, match="VilaUPipeline"):
                diffusers.DiffusionPipeline.from_pretrained(folders["pipeline"])
        finally:
            diffusers_sana.register()
        assert diffusers.VilaUPipeline is VilaUPipeline

    @pytest.mark.parametrize(
        ("kind", "file"),
        [
            ("pipeline", "model/config.json"),  # without it transformers makes a model of 7 billion parameters
            ("pipeline", "processor/tokenizer.json"),
            ("transformers", "tokenizer.json"),
            ("transformers", "model.safetensors"),
        ],
    )
    def test_damage(self, folders, tmp_path, kind, file):
        folder = shutil.copytree(folders[kind], tmp_path / "copy")
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(OSError, match=os.path.basename(file) + "' is not|" + file + " is damaged"):
            VilaUPipeline.from_pretrained(folder)
        (folder / file).unlink()
        with pytest.raises(OSError, match=f"{file} is missing|no file named {file}"):
            VilaUPipeline.from_pretrained(folder)

    def test_another_model(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        for name in ("processor_config.json", "tokenizer.json"):
            (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match="must hold a model of type 'vila_u', but has 'llama'"):
            VilaUPipeline.from_pretrained(tmp_path)


class TestOffload:
    def use(self, pipe):
        return codes_of(pipe).tolist(), pipe.chat(GREY, "cat?", max_new_tokens=6)

    def test_model_offload(self, pipe, monkeypatch):
        """The parts of the model are called, not the model: the hook that brings it to the device must run."""
        offloaded, moves = quiet(VilaUPipeline(tiny_model(), tiny_processor())), []
        offloaded.enable_model_cpu_offload(device="cpu")
        monkeypatch.setattr(
            "accelerate.hooks.CpuOffload.pre_forward",
            lambda hook, model, *args, **kwargs: moves.append(1) or (args, kwargs),
        )
        offloaded("c", output_type="latent")
        assert moves
        monkeypatch.undo()
        for _ in range(2):
            assert self.use(offloaded) == self.use(pipe)

    def test_group_offload(self, pipe):
        offloaded = quiet(VilaUPipeline(tiny_model(), tiny_processor()))
        cpu = torch.device("cpu")
        offloaded.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        assert self.use(offloaded) == self.use(pipe)

    @pytest.mark.gpu
    def test_from_an_accelerator(self):
        offloaded = quiet(VilaUPipeline(tiny_model(), tiny_processor()))
        on_device = quiet(VilaUPipeline(tiny_model(), tiny_processor()).to("cuda"))
        offloaded.enable_model_cpu_offload()
        for _ in range(2):
            assert self.use(offloaded) == self.use(on_device)
            assert offloaded.model.device.type == "cpu"
