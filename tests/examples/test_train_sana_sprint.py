"""Distilling at tiny size: on cached latents, on folders, resumed, and for the emoji checkpoint."""

import json
import sys

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffusers_sana
from diffusers_sana import SanaPipeline, SanaSprintPipeline, SanaTransformer2DModel, SVDQuantConfig
from diffusers_sana.checkpoints import SANA_EMOJI, SANA_EMOJI_SPRINT
from diffusers_sana.evaluation.emoji_probe import EmojiProbe
from diffusers_sana.loaders.lora.student import load_student
from diffusers_sana.models.transformers.sprint_student import make_student
from diffusers_sana.training.recipes.options import SprintTrainingConfig
from diffusers_sana.training.recipes.sprint import train
from examples.train_emoji import sprint as emoji
from examples.train_emoji.common import bundle_lora
from examples.train_emoji.scenes import COLORS, STYLES, held_out_scenes
from examples.train_sana_sprint import main
from tests.examples.conftest import few_scenes
from tests.numerics import assert_close_fp32, relative_error
from tests.training import tiny


WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def make_config(folder, **changes):
    settings = {"output_dir": str(folder), "max_steps": 3, "log_every": 1, "tangent_warmup_steps": 2}
    return SprintTrainingConfig(**settings | {"max_sequence_length": 32, "learning_rate": 1e-3} | changes)


@pytest.mark.parametrize("adversarial_weight", [0.5, 0.0])
def test_learns_and_leaves_the_teacher_alone(tmp_path, adversarial_weight):
    teacher = tiny.tiny_transformer()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    train(make_config(tmp_path, adversarial_weight=adversarial_weight), [tiny.latent_batch()], teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    student = SanaTransformer2DModel.from_pretrained(tmp_path / "model" / "transformer")
    assert student.config.guidance_embeds
    assert student.time_embed.guidance_embedder.linear_2.weight.any()  # which began as zeros
    rows = tiny.read_log(tmp_path)
    assert len(rows) == 3
    assert all(("discriminator" in row) == bool(adversarial_weight) for row in rows)
    assert not (tmp_path / "samples").exists()  # which need an autoencoder


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    teacher, vae, text_encoder = tiny.tiny_transformer(), tiny.tiny_autoencoder(), tiny.tiny_text_encoder()

    def run(folder, resume=False, stop_at=None):
        batches = tiny.interrupted(tiny.image_batches, stop_at)
        config = make_config(folder, max_steps=4, ema_decay=0.9, resume=resume)
        train(config, batches, teacher, tiny.encoders(text_encoder, vae))
        return load_file(folder / "model" / "transformer" / WEIGHTS)

    tiny.check_resuming(run, tmp_path)
    grid = Image.open(next((tmp_path / "whole" / "samples").glob("*.png")))
    assert grid.size == (4 * 32, 3 * 32)  # four prompts, in 1, 2 and 4 steps


def test_a_lora_of_the_student(tmp_path):
    """It loads into what the same teacher makes, in diffusers' own class too, and resumes without the base."""
    teacher, vae, text_encoder = tiny.tiny_transformer(), tiny.tiny_autoencoder(), tiny.tiny_text_encoder()

    def run(folder, resume=False, stop_at=None):
        batches = tiny.interrupted(tiny.image_batches, stop_at)
        config = make_config(folder, max_steps=4, lora_rank=2, sigma_data=0.4, ema_decay=0.9, resume=resume)
        train(config, batches, teacher, tiny.encoders(text_encoder, vae))
        return load_file(folder / "model" / LORA)

    tiny.check_resuming(run, tmp_path)
    weights = load_file(tmp_path / "whole" / "model" / LORA)
    assert weights["transformer.time_embed.guidance_embedder.linear_2.lora_B.weight"].any()
    latents, text = (
        torch.randn(2, teacher.config.in_channels, 8, 8),
        torch.randn(2, 5, teacher.config.caption_channels),
    )
    sigmas = torch.tensor([0.3, 0.8])
    outputs = []
    for library in (diffusers, diffusers_sana):
        base = library.SanaTransformer2DModel.from_config(teacher.config)
        base.load_state_dict(teacher.state_dict())
        arguments = {"guidance": torch.tensor([0.4, 0.5]), "return_dict": False}
        with torch.no_grad():
            plain = make_student(base)(latents, text, sigmas, **arguments)[0]
            outputs.append(load_student(base, tmp_path / "whole" / "model")(latents, text, sigmas, **arguments)[0])
        assert relative_error(plain, outputs[-1]) > 1e-4
        assert all(torch.equal(value, base.state_dict()[name]) for name, value in teacher.state_dict().items())
    assert_close_fp32(outputs[1], outputs[0])

    pipe = SanaPipeline.from_pipe(tiny.tiny_pipeline(), transformer=teacher)
    sprint = SanaSprintPipeline.from_teacher(pipe, tmp_path / "whole" / "model")
    assert sprint.scheduler.config.sigma_data == 0.4
    assert sprint.vae is pipe.vae
    sprint.save_pretrained(tmp_path / "saved")  # which refuses adapters
    saved = SanaTransformer2DModel.from_pretrained(tmp_path / "saved" / "transformer")
    with torch.no_grad():
        assert torch.equal(saved(latents, text, sigmas, **arguments)[0], outputs[1])


def test_a_lora_on_a_4_bit_student(tmp_path):
    """Its base is not trained, and the LoRA loads into the 16-bit student, too."""
    teacher = tiny.tiny_transformer()

    def run(folder, resume=False, stop_at=None):
        batches = tiny.interrupted(tiny.image_batches, stop_at)
        config = make_config(folder, max_steps=4, lora_rank=2, resume=resume)
        models = tiny.encoders(text_encoder, vae)
        train(config, batches, teacher, models, quantization=SVDQuantConfig(rank=2))
        return load_file(folder / "model" / LORA)

    vae, text_encoder = tiny.tiny_autoencoder(), tiny.tiny_text_encoder()
    weights = tiny.check_resuming(run, tmp_path)
    assert weights["transformer.transformer_blocks.0.attn1.to_q.lora_B.weight"].any()
    kept = load_file(next((tmp_path / "whole" / "checkpoints").rglob("model.safetensors")))
    assert all("lora" in name or "log_variance" in name for name in kept)
    before, after = make_student(teacher), load_student(teacher, tmp_path / "whole" / "model")
    changed = [name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])]
    assert "transformer_blocks.0.attn1.to_q.weight" in changed
    with pytest.raises(ValueError, match="`lora_rank` must be given for a quantized base"):
        train(make_config(tmp_path / "no"), [tiny.latent_batch()], teacher, quantization=SVDQuantConfig(rank=2))


def test_says_which_part_a_batch_needs(tmp_path):
    batch = tiny.latent_batch()
    for changed, match in (
        ({"latents": batch["latents"], "text": ["a"] * 4}, "`text_encoder` and `tokenizer` must be given"),
        ({name: batch[name] for name in batch if name != "latents"} | image_batch(), "`vae` must be given"),
    ):
        with pytest.raises(ValueError, match=match):
            train(make_config(tmp_path), [changed], tiny.tiny_transformer())


def image_batch():
    return {"pixel_values": torch.zeros(4, 3, 16, 16)}


def test_main_makes_a_pipeline(tmp_path):
    tiny.write_image_folder(tmp_path / "data", [(40, 40), (40, 40), (40, 90)])
    tiny.tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    arguments = ["--data", str(tmp_path / "data"), "--pretrained", str(tmp_path / "pipeline"), "--batch_size", "2"]
    arguments += ["--cache_dir", str(tmp_path / "cache"), "--num_workers", "0", "--resolution", "32"]
    arguments += ["--max_steps", "2", "--log_every", "1", "--max_sequence_length", "32", "--sigma_data", "0.4"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--sample_prompts", "a red cat", "two dogs"]
    main(arguments)
    assert Image.open(tmp_path / "out" / "samples" / "step_0000002.png").size == (2 * 32, 3 * 32)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    pipe = SanaSprintPipeline.from_pretrained(tmp_path / "out" / "model")
    assert pipe.scheduler.config.sigma_data == 0.4
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red cat", height=32, width=32, max_sequence_length=32).images[0].width > 0
    with pytest.raises(ValueError, match="`pretrained` must be a SanaPipeline"):
        main(arguments[:2])


def test_emoji(art, tmp_path):
    """The bundled checkpoint itself, for a step or two, and the judge's report."""
    teacher = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32)
    teacher.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "taught_scenes", few_scenes)
        patch.setattr(emoji, "held_out_scenes", lambda objects: held_out_scenes(objects, {"object": 1, "pair": 1}))
        folder = emoji.train(art, teacher, tmp_path / "latents.safetensors", tmp_path, minutes=0.01, batch_size=4)
        student = emoji.load_student(teacher, bundle_lora(folder, tmp_path / "bundle"))
        probe = EmojiProbe(art.objects, list(COLORS), list(STYLES), max_objects=3)
        report = emoji.judge(teacher, student, probe, art, tmp_path)
    rows = ["teacher_2_steps", "teacher_4_steps", "teacher_20_steps"]
    rows += [f"{name}_{steps}_steps" for name in ("untrained", "student") for steps in (1, 2, 4)]
    assert report["rows"] == rows
    assert all(0 <= report[row]["object"] <= 1 for row in rows)
    assert (tmp_path / "evaluation.json").read_text() == json.dumps(report, indent=1) + "\n"  # with its NaN
    assert Image.open(tmp_path / "held_out.png").size == (2 * 256, 9 * 256)


def test_the_bundled_student_needs_no_peft(monkeypatch):
    """The weights are those that PEFT's fusion gives, to the bit."""
    teacher = SanaTransformer2DModel.from_pretrained(SANA_EMOJI, subfolder="transformer", dtype=torch.float32)
    fused = make_student(teacher)
    fused.load_lora_adapter(SANA_EMOJI_SPRINT, prefix="transformer", weight_name=LORA)
    fused.fuse_lora()
    fused.unload_lora()
    monkeypatch.setitem(sys.modules, "peft", None)
    student = load_student(teacher, SANA_EMOJI_SPRINT).state_dict()
    assert all(torch.equal(value, student[name]) for name, value in fused.state_dict().items())
