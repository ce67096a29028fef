"""`diffusers-sana generate`: the right pipeline gets what the options say, and no image is wrong."""

import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_sana
from diffusers_sana import SanaControlNetModel, SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI, SANA_EMOJI_EDGES, SANA_EMOJI_PIXEL_ART, SANA_EMOJI_SPRINT
from diffusers_sana.cli.pipelines import SCHEDULERS, make_scheduler
from diffusers_sana.cli.words import known_words, unknown_words
from tests.cli.commands import run
from tests.pipelines.controlnet_cases import controlnet
from tests.pipelines.sprint_cases import sprint_pipeline


PROMPT = "an apple on a blue background"
FAST = ["--device", "cpu", "--steps", "2"]


def generate(*options) -> np.ndarray:
    """The command's only image."""
    ended = run("generate", PROMPT, *FAST, *map(str, options))
    assert ended.code == 0, ended.error
    (path,) = ended.out.splitlines()
    return np.asarray(Image.open(path)).astype(float)


def psnr(image: np.ndarray, wanted: np.ndarray) -> float:
    return float(20 * np.log10(255 / np.sqrt(((image - wanted) ** 2).mean() + 1e-12)))


@pytest.fixture(scope="module")
def pipe():
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def cat(tmp_path):
    Image.radial_gradient("L").convert("RGB").resize((128, 128)).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.fixture
def mask(tmp_path):
    Image.linear_gradient("L").resize((128, 128)).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_each_image_has_its_seed(pipe, tmp_path):
    """In the name of its file, and for itself: no image depends on how many are generated."""
    ended = run("generate", PROMPT, *FAST, "--seed", "3", "--num-images", "2", "--out", str(tmp_path / "new"))
    names = [f"an-apple-on-a-blue-background-seed{seed}.png" for seed in (3, 4)]
    assert ended.out.splitlines() == [str(tmp_path / "new" / name) for name in names]
    for name, seed in zip(names, (3, 4), strict=True):
        wanted = pipe(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(seed)).images[0]
        assert Image.open(tmp_path / "new" / name).tobytes() == wanted.tobytes()
    record = json.loads(Image.open(tmp_path / "new" / names[1]).info["diffusers_sana"])
    assert {name: record[name] for name in ("prompt", "seed", "steps", "model")} == {
        "prompt": PROMPT,
        "seed": 4,
        "steps": 2,
        "model": "sana-emoji",
    }
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in record["versions"]["torch"]


@pytest.mark.parametrize("given", ["image", "mask", "control", "control and image", "control and mask"])
def test_images_to_begin_with(pipe, tmp_path, cat, mask, given):
    image = Image.open(cat)
    arguments = {"num_inference_steps": 2}
    if given.startswith("control"):
        arguments |= {"control_image": image, "controlnet_conditioning_scale": 0.5}
        options = ["--control-image", cat, "--control-scale", "0.5"]
        components = {"controlnet": SanaControlNetModel.from_pretrained(SANA_EMOJI_EDGES, dtype=torch.float32)}
        name = "SanaControlNetPipeline"
        if given != "control":
            options, name = [*options, "--image", cat], "SanaControlNetImg2ImgPipeline"
            arguments |= {"image": image}
        if given == "control and mask":
            arguments |= {"mask_image": Image.open(mask)}
            options, name = [*options, "--mask", mask], "SanaControlNetInpaintPipeline"
    else:
        arguments |= {"image": image, "strength": 0.5}
        options, components, name = ["--image", cat, "--strength", "0.5"], {}, "SanaImg2ImgPipeline"
        if given == "mask":
            arguments |= {"mask_image": Image.open(mask)}
            options, name = [*options, "--mask", mask], "SanaInpaintPipeline"
    other = getattr(diffusers_sana, name).from_pipe(pipe, **components)
    wanted = other(PROMPT, generator=torch.Generator().manual_seed(0), **arguments).images[0]
    assert psnr(generate("--out", tmp_path / "out.png", *options), np.asarray(wanted).astype(float)) > 100


@pytest.mark.parametrize("has_image", [False, True])
def test_bundled_sprint(pipe, tmp_path, cat, has_image):
    name = "SanaSprintImg2ImgPipeline" if has_image else "SanaSprintPipeline"
    arguments = {"image": Image.open(cat)} if has_image else {}
    sprint = getattr(diffusers_sana, name).from_teacher(pipe, SANA_EMOJI_SPRINT)
    wanted = sprint(PROMPT, generator=torch.Generator().manual_seed(0), num_inference_steps=2, **arguments).images[0]
    image = generate("--model", "sana-emoji-sprint", "--out", tmp_path / "x.png", *(["--image", cat] * has_image))
    assert psnr(image, np.asarray(wanted).astype(float)) > 100


def test_sprint_with_a_controlnet(tmp_path, cat):
    """That of the teacher, at the size of the model."""
    sprint, net = sprint_pipeline(diffusers_sana), controlnet()
    sprint.save_pretrained(tmp_path / "sprint")
    net.save_pretrained(tmp_path / "net")
    control = ["--control-image", cat, "--control-scale", "0.1", "--dtype", "float32"]
    command = ["--model", tmp_path / "sprint", "--controlnet", tmp_path / "net", *control]
    pipe = diffusers_sana.SanaSprintControlNetPipeline.from_pipe(sprint, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    given = {"control_image": Image.open(cat), "controlnet_conditioning_scale": 0.1, "num_inference_steps": 2}
    wanted = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **given).images[0]
    image = generate(*command, "--out", tmp_path / "x.png")
    assert psnr(image, np.asarray(wanted).astype(float)) > 50
    plain = sprint(PROMPT, generator=torch.Generator().manual_seed(0), num_inference_steps=2).images[0]
    assert psnr(image, np.asarray(plain).astype(float)) < 40


def test_loras(pipe, tmp_path):
    """By name with a scale, and as a file; both twice as strong as one."""
    file = f"{SANA_EMOJI_PIXEL_ART}/pytorch_lora_weights.safetensors"
    half = generate("--lora", "sana-emoji-pixel-art:0.25", "--lora", f"{file}:0.25", "--out", tmp_path / "2.png")
    whole = generate("--model", "sana-emoji-pixel-art", "--lora", f"{file}:-0.5", "--out", tmp_path / "1.png")
    plain = pipe(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert psnr(half, whole) > 60
    assert psnr(half, np.asarray(plain).astype(float)) < 50


def test_schedulers(pipe):
    """Each follows the noise schedule of the checkpoint: with many steps all end at the same image."""

    def sample(name: str, steps: int) -> np.ndarray:
        other = SanaPipeline.from_pipe(pipe, scheduler=make_scheduler(name, pipe.scheduler.config))
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "np"}
        return other(PROMPT, generator=generator, **arguments).images[0] * 255

    wanted = sample("dpm++", 24)
    for name, (kind, takes_sigmas) in SCHEDULERS.items():
        scheduler = make_scheduler(name, pipe.scheduler.config)
        assert type(scheduler).__name__ == kind
        assert ("sigmas" in inspect.signature(scheduler.set_timesteps).parameters) == takes_sigmas
        if name != "dpm++":
            assert psnr(sample(name, 16), wanted) > 20, name


def test_scheduler_and_sigmas(pipe, tmp_path):
    other = SanaPipeline.from_pipe(pipe, scheduler=make_scheduler("euler", pipe.scheduler.config))
    wanted = other(PROMPT, sigmas=[1.0, 0.6, 0.2], generator=torch.Generator().manual_seed(0)).images[0]
    ended = run("generate", PROMPT, "--scheduler", "euler", "--sigmas", "1,0.6,0.2", "--out", str(tmp_path / "x.png"))
    assert ended.code == 0, ended.error
    assert Image.open(tmp_path / "x.png").tobytes() == wanted.tobytes()


def test_float16(tmp_path, caplog, capfd):
    image = generate("--dtype", "float16", "--out", tmp_path / "16.png")
    assert caplog.text.count("float16 is slow on a CPU; float32 or bfloat16 (--dtype) is faster there.") == 1
    assert "cannot run with `cpu`" not in capfd.readouterr().err + caplog.text
    caplog.clear()
    wanted = generate("--dtype", "bfloat16", "--out", tmp_path / "b16.png")
    assert "is slow" not in caplog.text
    assert psnr(image, wanted) > 40


def test_largest_seed(tmp_path):
    assert generate("--seed", 2**63 - 1, "--out", tmp_path / "x.png").std() > 1


def test_words_that_a_bundled_model_was_not_taught(tmp_path, caplog):
    assert unknown_words("sana-emoji", "A cyberpunk fox, 3D style, with a neon sign") == [
        "cyberpunk",
        "with",
        "neon",
        "sign",
    ]
    assert unknown_words("some/model", "a cyberpunk fox") == []
    assert {"fox", "foxes", "background", "purple", "two"} < known_words()
    run("generate", "a cyberpunk fox", *FAST, "--steps", "1", "--out", str(tmp_path / "x.png"))
    assert "sana-emoji was not taught: cyberpunk. It knows the words on its card" in caplog.text
