"""Training a ControlNet at tiny size: on cached latents, on folders, resumed, and for the emoji checkpoint."""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_sana import SanaControlNetModel, SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.images import sobel_edges
from diffusers_sana.training.recipes.controlnet import train
from diffusers_sana.training.recipes.options import ControlNetTrainingConfig
from examples.train_emoji import controlnet as emoji
from examples.train_emoji.scenes import OBJECTS, Scene, held_out_scenes
from examples.train_sana_controlnet import main
from tests.examples.conftest import few_scenes
from tests.training import tiny


WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_config(folder, **changes):
    settings = {"output_dir": str(folder), "max_steps": 3, "log_every": 1, "warmup_steps": 0, "sample_steps": 2}
    return ControlNetTrainingConfig(**settings | {"max_sequence_length": 32, "caption_dropout": 0.5} | changes)


def controlled_batch():
    """A batch of latents; what is to be generated is in the control latents."""
    batch = tiny.latent_batch()
    return batch | {"control_latents": -batch["latents"]}


@pytest.mark.parametrize("wiring", ["diffusers", "nvlabs"])
def test_learns_and_leaves_the_transformer_alone(tmp_path, wiring):
    transformer = tiny.tiny_transformer()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    model = SanaControlNetModel.from_transformer(transformer, num_layers=1, wiring=wiring)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    config = make_config(tmp_path, max_steps=60, learning_rate=2e-2, caption_dropout=0.0)
    train(config, [controlled_batch()], model, transformer)
    losses = [row["loss"] for row in tiny.read_log(tmp_path)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
    saved = SanaControlNetModel.from_pretrained(tmp_path / "model")
    assert saved.config["wiring"] == wiring
    assert all(not torch.equal(value, start[name]) for name, value in saved.state_dict().items() if "to_k" in name)
    assert not (tmp_path / "samples").exists()  # which need an autoencoder


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    transformer, vae, text_encoder = tiny.tiny_transformer(), tiny.tiny_autoencoder(), tiny.tiny_text_encoder()
    start = SanaControlNetModel.from_transformer(transformer, num_layers=1).state_dict()

    def run(folder, resume=False, stop_at=None):
        model = SanaControlNetModel.from_transformer(transformer, num_layers=1)

        def with_edges(start):
            return (
                batch | {"control_image": sobel_edges(batch["pixel_values"])} for batch in tiny.image_batches(start)
            )

        config = make_config(folder, max_steps=4, ema_decay=0.9, resume=resume, learning_rate=1e-2)
        encoders = tiny.encoders(text_encoder, vae)
        train(config, tiny.interrupted(with_edges, stop_at), model, transformer, encoders)
        return load_file(folder / "model" / WEIGHTS)

    whole = tiny.check_resuming(run, tmp_path)
    assert any(not torch.equal(whole[name], start[name]) for name in whole)
    assert list((tmp_path / "whole" / "samples").glob("*.png"))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    transformer, batch, results = tiny.tiny_transformer(), controlled_batch(), []
    for checkpointing in (False, True):
        model = SanaControlNetModel.from_transformer(transformer, num_layers=1)
        folder = tmp_path / str(checkpointing)
        train(make_config(folder, gradient_checkpointing=checkpointing), [batch], model, transformer)
        results.append(load_file(folder / "model" / WEIGHTS))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_says_which_part_a_batch_needs(tmp_path):
    transformer, batch = tiny.tiny_transformer(), controlled_batch()
    model = SanaControlNetModel.from_transformer(transformer, num_layers=1)
    image = {"control_image": torch.zeros(4, 3, 16, 16)}
    for changed, match in (
        ({"latents": batch["latents"], "control_latents": batch["latents"], "text": ["a"] * 4}, "`text_encoder`"),
        ({name: value for name, value in batch.items() if name != "control_latents"} | image, "`control_latents`"),
    ):
        with pytest.raises(ValueError, match=match):
            train(make_config(tmp_path), [changed], model, transformer)


@pytest.mark.parametrize("control", ["edges", "folder"])
def test_main(tmp_path, control):
    tiny.write_image_folder(tmp_path / "data", [(40, 40), (40, 40), (40, 90)])
    tiny.tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    arguments = ["--data", str(tmp_path / "data"), "--pretrained", str(tmp_path / "pipeline"), "--num_layers", "1"]
    arguments += ["--batch_size", "2", "--num_workers", "0", "--resolution", "32", "--max_steps", "2"]
    arguments += ["--sample_steps", "1", "--log_every", "1", "--max_sequence_length", "32"]
    arguments += ["--output_dir", str(tmp_path / "out")]
    if control == "folder":
        arguments += ["--control_data", str(tmp_path / "control")]
        with pytest.raises(ValueError, match="`control_data` must have a control image for each"):
            main(arguments)
        (tmp_path / "control").mkdir()
        for path in (tmp_path / "data").glob("*.png"):
            Image.open(path).convert("L").save(tmp_path / "control" / path.name)
    main(arguments)
    model = SanaControlNetModel.from_pretrained(tmp_path / "out" / "model")
    assert model.config["num_layers"] == 1
    assert any(parameter.any() for parameter in model.controlnet_blocks.parameters())
    with pytest.raises(ValueError, match="`pretrained` must be a SanaPipeline"):
        main(arguments[:2])


def test_sobel_edges():
    image = torch.full((1, 3, 6, 8), -1.0)
    image[:, 0, :, 4:] = 1  # red on the right
    edges = sobel_edges(image)
    assert edges.shape == image.shape
    expected = torch.full((6, 8), -1.0)
    expected[:, 3:5] = 1
    assert torch.allclose(edges[0, 2], expected, atol=1e-5)
    assert torch.allclose(sobel_edges(image.transpose(2, 3)), edges.transpose(2, 3))
    assert torch.equal(sobel_edges(torch.zeros(1, 3, 4, 4)), torch.full((1, 3, 4, 4), -1.0))  # also at the border


def test_prompts_leave_the_arrangement_to_the_edges():
    pair = ("zebra", "apple"), "flat", "red"
    assert emoji.open_prompt(Scene(*pair)) == "an apple and a zebra on a red background, flat style"
    assert emoji.open_prompt(Scene(*pair)) == emoji.open_prompt(Scene(("apple", "zebra"), *pair[1:]))
    one = "a fox on a blue background, 3d style"
    for objects, position in ((("fox",), ""), (("fox",), "left"), (("fox",) * 3, "")):
        assert emoji.open_prompt(Scene(objects, "3d", "blue", position)) == one
    rng, scenes = random.Random(0), held_out_scenes(list(OBJECTS))
    captions = [emoji.open_caption(scene, rng) for scene in scenes * 10]
    assert captions.count("") / len(captions) == pytest.approx(emoji.EMPTY, abs=0.05)


def test_emoji(art, tmp_path):
    """The bundled checkpoint itself, for a few steps, and the judge's report."""
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "taught_scenes", few_scenes)
        patch.setattr(emoji, "held_out_scenes", lambda objects: held_out_scenes(objects, {"object": 1, "pair": 1}))
        folder = emoji.train(art, pipe, tmp_path, minutes=0.01, batch_size=4, count=8)
        model = SanaControlNetModel.from_pretrained(folder)
        report = emoji.judge(pipe, model, art, tmp_path, steps=2)
    scenes, edges = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in ("scenes", "edges"))
    assert scenes.shape == edges.shape == (8, 32, 8, 8)
    assert not torch.equal(scenes, edges)
    figures = report["mean_cosine_of_edges"]
    assert figures.keys() == {"prompt_alone", "edges_alone", "prompt_and_edges", "true_through_autoencoder"}
    for cosines in figures.values():
        assert cosines.keys() == {"all", "object", "pair"}
        assert all(0 < value < 1 for value in cosines.values())
    assert json.loads(Path(tmp_path / "evaluation.json").read_text()) == report
    assert Image.open(tmp_path / "held_out.png").size == (2 * 256, 5 * 256)
