"""The emoji example from end to end on made-up art, and its parts: scenes, captions, tokenizer, held-out prompts."""

import json

import torch

from diffusers_sana.prompts.encoding import complex_human_instruction
from examples.train_emoji import run
from examples.train_emoji.data import COLORS, EmojiScenes, Scene, is_held_out, with_article
from examples.train_emoji.evaluate import held_out_scenes, prompt_following
from examples.train_emoji.models import make_autoencoder, make_text_encoder, make_transformer
from examples.train_emoji.tokenizer import make_tokenizer, texts
from tests.examples.conftest import NAMES


def test_art(art):
    assert art.labels == NAMES
    assert art.held_out
    assert not set(art.held_out) & {*art.training, *art.objects}


def test_scene_shows_what_its_caption_says(art):
    scenes = EmojiScenes(art, 64)
    left, both = scenes.render(
        [Scene(("red ball",), "3d", "blue", " on the left"), Scene(("red ball", "green box"), "flat", "white")],
        jitter=0,
    )
    blue = torch.tensor(COLORS["blue"]) / 127.5 - 1
    assert (left[:, 32, 60] - blue).abs().max() < 0.05, "the right half is background"
    assert left[2, 32, 16] < 0 < left[0, 32, 16], "red is on the left"
    assert both[1, 32, 16] < 0 < both[0, 32, 16], "red is on the left"
    assert both[0, 32, 48] < both[1, 32, 48], "green is on the right"


def test_batches_are_reproducible(art):
    first, again = (next(EmojiScenes(art, 32, seed=3).autoencoder_batches(4))["pixel_values"] for _ in range(2))
    assert first.shape == (4, 3, 32, 32)
    assert torch.equal(first, again)
    assert first.abs().max() <= 1


def test_captions(art):
    scenes = EmojiScenes(art)
    scene = Scene(("red ball",), "3d", "orange", " at the top")
    assert scene.prompt == "a red ball at the top on an orange background, 3d style"
    assert {"a 3d red ball at the top on an orange background", scene.prompt} <= {
        scenes.caption(scene) for _ in range(200)
    }
    assert with_article("grapes") == "grapes"
    assert with_article("cactus") == "a cactus"
    assert with_article("apple") == "an apple"


def test_training_never_shows_what_is_held_out(art):
    scenes = EmojiScenes(art)
    sampled = [scenes.sample_scene() for _ in range(2000)]
    assert not any(is_held_out(s.labels[0], s.style, s.color) for s in sampled if len(s.labels) == 1)
    for scene in held_out_scenes(art.labels, singles=8, pairs=2)[:8]:
        assert is_held_out(scene.labels[0], scene.style, scene.color)


def test_tokenizer_is_gemmas(art, tmp_path):
    from transformers import GemmaTokenizerFast

    instruction = complex_human_instruction()
    tokenizer = make_tokenizer(texts(art), instruction)
    prefix = tokenizer.encode(instruction)
    tokens = tokenizer.encode(instruction + "a red ball on a blue background, 3d style")
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens[: len(prefix) - 1] == prefix[:-1], "the last token of the instruction is a space that fuses"
    words = tokenizer.convert_ids_to_tokens(tokens[len(prefix) - 1 :])
    assert words == ["▁a", "▁red", "▁ball", "▁on", "▁a", "▁blue", "▁background", ",", "▁3d", "▁style"]
    tokenizer.save_pretrained(tmp_path)
    assert GemmaTokenizerFast.from_pretrained(tmp_path).encode("zürich ☃") == tokenizer.encode("zürich ☃")


def test_sizes(art):
    """What is bundled stays under 30 MB of bf16."""
    tokenizer = make_tokenizer(texts(art), complex_human_instruction())
    with torch.device("meta"):
        models = [make_autoencoder(), make_transformer(), make_text_encoder(tokenizer)]
    assert 2 * sum(p.numel() for model in models for p in model.parameters()) < 30e6


def test_evaluation_recognizes_the_truth(art):
    """The measure itself: true renderings score 1, renderings of something else do not."""
    scenes = held_out_scenes(art.labels, singles=6, pairs=0)
    renderer = EmojiScenes(art, 64)
    wrong = [Scene((NAMES[NAMES.index(s.labels[0]) - 4],), s.style, "black", s.position) for s in scenes]
    images = {"true": renderer.render(scenes), "wrong": renderer.render(wrong)}
    figures = prompt_following(images, scenes, renderer)
    assert figures["true"]["object_top1"] == figures["true"]["color_top1"] == 1
    assert figures["wrong"]["object_top1"] < 0.5
    assert figures["wrong"]["color_top1"] < 0.5


def test_run(pack, art, tmp_path, monkeypatch):
    """All stages, a few steps each, then again: a finished stage is only loaded."""
    small = run.Preset("no", 2, 1e-3, 4, 1e-3, 16, 2, True, False, False)
    monkeypatch.setattr(run, "PRESETS", {"cpu": small, "cuda": small})
    monkeypatch.setattr(run, "held_out_scenes", lambda labels: held_out_scenes(labels, singles=2, pairs=0))
    monkeypatch.setattr("examples.train_emoji.evaluate.held_out_scenes", run.held_out_scenes)
    arguments = ["--data", str(pack), "--out", str(tmp_path), "--minutes", "0.05"]
    run.main(arguments)
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert report["autoencoder_on_held_out_emoji"]["psnr_db"] > 3
    assert 0 <= report["generated_from_held_out_prompts"]["object_top1"] <= 1
    assert (tmp_path / "evaluation" / "held_out.png").exists()
    run.main([*arguments, "--stage", "decoder"])
