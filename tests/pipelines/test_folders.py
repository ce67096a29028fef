"""Folders: the official layout loads our classes, and what we save is the official layout again."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import diffusers_sana
from diffusers_sana import SVDQuantConfig, quantize
from diffusers_sana.checkpoints import SANA_EMOJI
from tests import tiny
from tests.numerics import assert_close_fp32


OURS = {
    "transformer": diffusers_sana.SanaTransformer2DModel,
    "vae": diffusers_sana.AutoencoderDC,
    "scheduler": diffusers_sana.FlowDPMSolverScheduler,
}


def load(folder, **kwargs):
    pipe = diffusers_sana.SanaPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe):
    noise = torch.randn(1, tiny.LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(3))
    arguments = {"latents": noise, "height": 32, "width": 32, "use_resolution_binning": False}
    return pipe("a cat", num_inference_steps=2, output_type="pt", **arguments).images


@pytest.fixture
def folder(official_folder, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(official_folder, tmp_path / "pipeline")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])


def test_official_folder_loads_our_classes(official_folder, upstream):
    pipe = load(official_folder)
    assert {name: type(getattr(pipe, name)) for name in OURS} == OURS
    assert pipe.scheduler.config.flow_shift == tiny.OFFICIAL_SCHEDULER["flow_shift"]
    assert_close_fp32(generate(pipe), generate(upstream))


@pytest.mark.parametrize("dtype", [torch.bfloat16, {"transformer": torch.float16, "default": torch.bfloat16}], ids=str)
def test_dtypes(official_folder, dtype):
    pipe = load(official_folder, dtype=dtype)
    wanted = dtype if isinstance(dtype, dict) else {"transformer": dtype, "default": dtype}
    assert pipe.transformer.dtype == wanted["transformer"]
    assert pipe.text_encoder.dtype == pipe.vae.dtype == wanted["default"]


def test_variant(tmp_path):
    pipe = tiny.pipeline(diffusers)
    pipe.save_pretrained(tmp_path)
    pipe.transformer.proj_out.bias.data += 1
    pipe.save_pretrained(tmp_path, variant="fp16")
    biases = [load(tmp_path, **kwargs).transformer.proj_out.bias for kwargs in ({}, {"variant": "fp16"})]
    assert_close_fp32(biases[1], biases[0] + 1)


def test_passed_components_are_used(official_folder):
    passed = {"transformer": tiny.transformer(diffusers), "scheduler": tiny.scheduler(), "vae": None}
    pipe = load(official_folder, **passed)
    assert {name: getattr(pipe, name) for name in passed} == passed


def test_other_schedulers_stay(folder):
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    assert type(load(folder).scheduler) is diffusers.FlowMatchEulerDiscreteScheduler


def test_solver_that_predicts_noise_stays(tmp_path):
    """Only diffusers' own can step with it, as it does in the pipeline that was saved."""
    upstream = tiny.pipeline(diffusers)
    upstream.scheduler = diffusers.DPMSolverMultistepScheduler()
    upstream.save_pretrained(tmp_path)
    for cls in (diffusers_sana.SanaPipeline, diffusers.DiffusionPipeline):
        pipe = cls.from_pretrained(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe) is diffusers_sana.SanaPipeline
        assert type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler
        assert_close_fp32(generate(pipe), generate(upstream))
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["prediction_type"]  # diffusers takes it for noise
    file.write_text(json.dumps(config))
    assert type(load(tmp_path).scheduler) is diffusers.DPMSolverMultistepScheduler
    cut(file)
    with pytest.raises(OSError, match="scheduler_config"):
        load(tmp_path)


def test_folder_of_a_relative_pipeline(folder):
    # Its components that we do not have are left out, as in diffusers.
    edit(folder / "model_index.json", _class_name="SanaControlNetPipeline", controlnet=["diffusers", "X"])
    assert type(load(folder).transformer) is diffusers_sana.SanaTransformer2DModel


def test_from_pipe_of_diffusers(upstream):
    assert diffusers_sana.SanaPipeline.from_pipe(upstream).components == upstream.components


@pytest.mark.parametrize("registered", [True, False])
def test_saved_index_is_the_official_one(tmp_path, ours, registered):
    if not registered:
        diffusers_sana.unregister()
    try:
        pipe = diffusers_sana.SanaPipeline(**ours.components)
        pipe.scheduler = tiny.scheduler(diffusers)
        pipe.scheduler = tiny.scheduler(diffusers_sana)
        pipe.save_pretrained(tmp_path)
    finally:
        diffusers_sana.register()
    index = json.loads((tmp_path / "model_index.json").read_text())
    official = tiny.OFFICIAL_INDEX | {"tokenizer": ["transformers", "GemmaTokenizer"]}
    assert {name: value for name, value in index.items() if name[0] != "_"} == official
    assert index["_class_name"] == "SanaPipeline"


def test_folders_load_without_this_package(tmp_path, ours):
    """In a fresh process that never imports it: what is saved has the classes and the image, what is bundled loads."""
    ours.save_pretrained(tmp_path)
    torch.save(generate(ours), tmp_path / "image.pt")
    card = Path(SANA_EMOJI, "README.md").read_text()
    assert re.search(r"called with `height=256, width=256,\s+use_resolution_binning=False`", card)
    script = f"""
import sys, torch, diffusers
pipe = diffusers.DiffusionPipeline.from_pretrained({str(tmp_path)!r})
assert type(pipe) is diffusers.SanaPipeline
for name, cls in [("transformer", "SanaTransformer2DModel"), ("vae", "AutoencoderDC"),
                  ("scheduler", "DPMSolverMultistepScheduler")]:
    assert type(getattr(pipe, name)) is getattr(diffusers, cls), name
noise = torch.randn(1, {tiny.LATENT_CHANNELS}, 16, 16, generator=torch.Generator().manual_seed(3))
image = pipe("a cat", latents=noise, height=32, width=32, use_resolution_binning=False, num_inference_steps=2,
             output_type="pt").images
assert torch.allclose(image, torch.load({str(tmp_path / "image.pt")!r}), atol=1e-5)

pipe = diffusers.DiffusionPipeline.from_pretrained({str(SANA_EMOJI)!r})
image = pipe("a fox", num_inference_steps=1, height=256, width=256, use_resolution_binning=False).images[0]
assert image.size == (256, 256)
assert "diffusers_sana" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_folder_that_says_which_pipeline_generates(tmp_path, ours):
    """`DiffusionPipeline.from_pretrained`, without a word more: bundled, and written in 16 and in 4 bits."""
    folders = {SANA_EMOJI: "SanaPipeline"}
    for name in ("SanaImg2ImgPipeline", "SanaPAGPipeline", "SanaInpaintPipeline"):
        getattr(diffusers_sana, name).from_pipe(ours).save_pretrained(tmp_path / name)
        folders[tmp_path / name] = name
    small = tiny.pipeline(diffusers_sana)
    quantize(small, SVDQuantConfig(rank=2, refinements=0, smoothing="none"), progress=False)
    small.save_pretrained(tmp_path / "4 bits")
    folders[tmp_path / "4 bits"] = "SanaPipeline"
    for folder, name in folders.items():
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
        assert type(pipe) is getattr(diffusers_sana, name)
        assert type(pipe.transformer) is diffusers_sana.SanaTransformer2DModel
    pipe = diffusers.DiffusionPipeline.from_pretrained(SANA_EMOJI)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a fox", num_inference_steps=1).images[0].size == (256, 256)


def test_save_and_load_is_exact(tmp_path, ours):
    ours.save_pretrained(tmp_path)
    first, second = load(tmp_path), load(tmp_path)
    for name in ("text_encoder", "transformer", "vae"):
        weights = getattr(first, name).state_dict()
        assert all(torch.equal(weights[key], value) for key, value in getattr(ours, name).state_dict().items())
    assert torch.equal(generate(first), generate(second))
    # Weights mapped from a file are aligned otherwise than allocated ones; CPU kernels then sum in another order.
    assert_close_fp32(generate(first), generate(ours), tolerance=1e-6)


def test_arguments_of_saving_reach_the_models(tmp_path, ours):
    ours.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16")
    assert len(list((tmp_path / "transformer").glob("*.fp16-0000*.safetensors"))) > 1
    assert len(list((tmp_path / "vae").glob("*.fp16-0000*.safetensors"))) > 1
    assert torch.equal(generate(load(tmp_path, variant="fp16")), generate(load(tmp_path, variant="fp16")))


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
class TestDamage:
    def test_missing_file(self, folder, file):
        (folder / file).unlink()
        named = (
            f"{file.split('/')[0]} has no file of weights" if file.endswith(".safetensors") else f"{file} is missing"
        )
        with pytest.raises(OSError, match=named):
            load(folder)

    def test_truncated_file(self, folder, file):
        cut(folder / file)
        with pytest.raises(OSError, match=file):
            load(folder)


@pytest.mark.parametrize("name", tiny.OFFICIAL_INDEX)
def test_passed_component_needs_no_files(folder, ours, name):
    shutil.rmtree(folder / name)
    assert getattr(load(folder, **{name: getattr(ours, name)}), name) is getattr(ours, name)


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "vae"])
def test_missing_shard(folder, name):
    component = getattr(tiny.pipeline(diffusers), name)
    shutil.rmtree(folder / name)
    component.save_pretrained(folder / name, max_shard_size="8KB")
    assert getattr(load(folder), name) is not None
    shard = sorted((folder / name).glob("*00002-of*"))[0]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        load(folder)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="neither a valid local path nor a valid repo id"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"safety": ["diffusers", "Checker"]}, "`safety`: neither a component of SanaPipeline"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderXY"]}, "no class `AutoencoderXY`"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "`prediction_type` must be"),
        ("transformer/config.json", {"caption_channels": 8}, "caption_projection.linear_1.weight"),
    ],
)
def test_contradictory_configs(folder, file, changes, message):
    edit(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_unknown_argument(official_folder):
    # diffusers warns and loads what was not asked for.
    with pytest.raises(ValueError, match="`varient`: neither a component of SanaPipeline nor an argument"):
        load(official_folder, varient="fp16")


def test_wrong_component(official_folder):
    with pytest.raises(ValueError, match="should be"):
        load(official_folder, vae="a string")
