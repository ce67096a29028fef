"""The emoji example: scenes and what is held out of them, each training, tiny, and the blind test."""

import io
import json
import random
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_sana import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from diffusers_sana.evaluation.checks import read_checks
from diffusers_sana.evaluation.emoji_probe import EmojiProbe
from diffusers_sana.prompts.encoding import complex_human_instruction
from examples.train_emoji import autoencoder, blind, judge, latents, transformer
from examples.train_emoji.latents import latent_batches, load_latents, taught_scenes
from examples.train_emoji.models import make_autoencoder, make_text_encoder, make_transformer
from examples.train_emoji.scenes import (
    COLORS,
    GRID,
    HELD_OUT,
    OBJECTS,
    STYLES,
    Scene,
    Scenes,
    crop,
    held_out_scenes,
    image_batches,
    is_held_out,
    placement,
    plural,
    render,
    with_article,
)
from examples.train_emoji.tokenizer import make_tokenizer, texts
from tests.examples.conftest import WORDS
from tests.tiny import TRANSFORMER


WEIGHTS = "diffusion_pytorch_model.safetensors"


def color_at(image, x, y):
    """Of the pixel, in [0, 255]."""
    return ((image[:, y, x] + 1) * 127.5).round()


def test_the_pack_is_read_as_it_was_written(pack, art):
    with zipfile.ZipFile(pack) as file:
        assert Image.open(io.BytesIO(file.read("flat/cat.webp"))).size == (256, 256)
    assert art.objects == list(WORDS)
    assert {side: tuple(pixels.shape) for side, pixels in art.pixels.items()} == {
        side: (len(WORDS), 2, 4, side, side) for side in (192, 128)
    }


def test_a_pair_stands_left_and_right_and_three_stand_in_a_triangle(art):
    pair = Scene(("red ball", "blue ball"), "3d", "white")
    three = Scene(("red ball",) * 3, "flat", "green")
    at_the_top = Scene(("blue ball",), "flat", "green", "top")
    pair_image, three_image, top_image = render(art, [pair, three, at_the_top])
    red, blue, green = (torch.tensor(rgb) for rgb in ((255, 0, 0), (0, 0, 255), COLORS["green"]))
    assert (color_at(pair_image, 64, 128) - red).abs().max() < 8
    assert (color_at(pair_image, 192, 128) - blue).abs().max() < 8
    assert (color_at(pair_image, 128, 10) - torch.tensor(COLORS["white"])).abs().max() < 1
    for x, y in ((128, 64), (64, 192), (192, 192)):
        assert (color_at(three_image, x, y) - red).abs().max() < 8
    assert (color_at(three_image, 20, 64) - green).abs().max() < 1
    assert (color_at(top_image, 128, 64) - blue).abs().max() < 8
    assert (color_at(top_image, 128, 192) - green).abs().max() < 1


def test_every_object_stands_on_the_token_grid(art):
    source = Scenes(art.objects, seed=1)
    for scene in (source.sample(held_out=None) for _ in range(300)):
        side, corners = placement(scene)
        assert all(value % GRID == 0 for corner in corners for value in corner)
        assert all(0 <= value <= 256 - side for corner in corners for value in corner)


def test_a_crop_is_a_square_of_the_scene_on_the_token_grid_mostly_with_an_object(art):
    scenes = [
        Scene(("cat",), "3d", "red"),
        Scene(("cat",), "3d", "red", "left"),
        Scene(("cat", "dog"), "flat", "blue"),
    ]
    images = render(art, scenes)
    rng = random.Random(0)
    with_object = []
    for _ in range(40):
        for image, part in zip(images, crop(images, scenes, 128, rng), strict=True):
            places = [(x, y) for x in range(0, 129, GRID) for y in range(0, 129, GRID)]
            assert any(torch.equal(part, image[:, y : y + 128, x : x + 128]) for x, y in places)
            background = image[:, 0, 0, None, None]
            with_object.append(((part - background).abs().amax(0) > 0.1).float().mean() > 0.3)
    assert 0.87 < sum(with_object) / len(with_object) < 1


def test_batches_are_reproducible(art):
    first, again = (next(image_batches(art, 3, 128, seed=5))["pixel_values"] for _ in range(2))
    assert first.shape == (3, 3, 128, 128)
    assert torch.equal(first, again)
    assert not torch.equal(first, next(image_batches(art, 3, 128, seed=6))["pixel_values"])


def test_captions_name_what_the_scene_shows():
    pair = Scene(("cat", "dog"), "3d", "orange")
    assert pair.prompt == "a cat on the left and a dog on the right on an orange background, 3d style"
    phrasings = {pair.caption(random.Random(seed)) for seed in range(200)}
    assert "a dog to the right of a cat on an orange background, 3d style" in phrasings
    assert not any("a cat to the right" in phrasing or "a dog to the left" in phrasing for phrasing in phrasings)
    assert Scene(("tomato",) * 2, "flat", "red").prompt == "two tomatoes on a red background, flat style"
    assert Scene(("bread",), "flat", "red", "top").prompt == "bread at the top on a red background, flat style"
    assert Scene(("key",), "3d", "red", "center").prompt == "a small key on a red background, 3d style"


def test_english():
    assert [with_article(word) for word in ("egg", "ufo", "umbrella", "unicorn", "grapes")] == [
        *("an egg", "a ufo", "an umbrella", "a unicorn", "grapes")
    ]
    assert [plural(word) for word in ("bus", "candy", "monkey", "mouse", "fox", "fish", "apple")] == [
        *("buses", "candies", "monkeys", "mice", "foxes", "fish", "apples")
    ]


def test_training_never_shows_what_is_held_out():
    source = Scenes(list(OBJECTS), seed=2)
    assert not any(is_held_out(source.sample()) for _ in range(3000))
    scene = Scene(("cat", "dog"), "3d", "red")
    assert is_held_out(scene) == is_held_out(replace(scene, objects=("dog", "cat"))), "order tells nothing new"
    single = Scene(("cat",), "flat", "blue")
    assert is_held_out(single) == is_held_out(replace(single, position="left"))


def test_the_held_out_prompts_are_those_that_were_chosen_before_training():
    """The file was written before any training; the rule that made it must not drift."""
    scenes = held_out_scenes(list(OBJECTS))
    chosen = (Path(autoencoder.__file__).parent / "held_out_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert [scene.prompt for scene in scenes] == chosen
    assert len(set(chosen)) == sum(HELD_OUT.values()) == 100
    assert all(is_held_out(scene) for scene in scenes)


def test_tokenizer_is_gemmas(art, tmp_path):
    from transformers import GemmaTokenizerFast

    instruction = complex_human_instruction()
    tokenizer = make_tokenizer(texts(art.objects), instruction)
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
    tokenizer = make_tokenizer(texts(art.objects), complex_human_instruction())
    with torch.device("meta"):
        models = [make_autoencoder(), make_transformer(), make_text_encoder(tokenizer)]
    assert 2 * sum(p.numel() for model in models for p in model.parameters()) < 30e6


def test_the_autoencoder_fits_beside_the_other_parts():
    """The weights of all bundled parts share 18.9 M parameters."""
    with torch.device("meta"):
        model = make_autoencoder()
    assert sum(p.numel() for p in model.parameters()) < 8.5e6


def tiny():
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(4, 4, 8, 8, 16, 16),
        decoder_block_out_channels=(4, 4, 8, 8, 16, 16),
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
    )


def test_phases_follow_each_other(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "make_autoencoder", tiny)
    monkeypatch.setattr(autoencoder, "JUDGED", 2)
    small = {
        number: replace(phase, batch_size={"cpu": 2, "cuda": 2}, settings={**phase.settings, "gan_warmup_steps": 0})
        for number, phase in autoencoder.PHASES.items()
    }
    monkeypatch.setattr(autoencoder, "PHASES", small)
    monkeypatch.setattr(autoencoder, "COMMON", {**autoencoder.COMMON, "max_steps": 2, "scaling_batches": 1})
    arguments, out = ["--data", str(pack), "--results", str(tmp_path / "results")], tmp_path / "first"
    autoencoder.main([*arguments, "--out", str(out)])
    assert [len((out / f"phase_{number}" / "log.jsonl").read_text().splitlines()) for number in small] == [1, 1, 1]
    assert (out / "judged.png").exists()
    phases = [load_file(out / f"phase_{number}" / "model" / WEIGHTS) for number in small]
    for before, after, name in ((0, 1, "encoder.conv_in.conv.weight"), (1, 2, "encoder.conv_out.weight")):
        assert torch.equal(phases[before][name], phases[after][name]), name  # each begins with the one before
    trained = out / "phase_3" / "model"
    assert AutoencoderDC.from_pretrained(trained).config.scaling_factor != tiny().config.scaling_factor

    autoencoder.main([*arguments, "--out", str(tmp_path / "judged"), "--judge", str(trained)])
    (results,) = (tmp_path / "results").glob("*/emoji_autoencoder.json")
    report = json.loads(results.read_text())
    assert report["scenes"] == 2
    assert {"psnr_db", "gradient_energy", "latent_rms", "device", "versions"} <= set(report)

    # Another folder goes on from the model: a phase that only trains the decoder keeps its encoder.
    autoencoder.main([*arguments, "--out", str(tmp_path / "second"), "--phase", "3", "--init", str(trained)])
    again = load_file(tmp_path / "second" / "phase_3" / "model" / WEIGHTS)
    for name, value in phases[2].items():
        assert not name.startswith("encoder.") or torch.equal(again[name], value), name
    with pytest.raises(ValueError, match=r"`phase` 2 needs .*phase_1.*pass `init`"):
        autoencoder.main([*arguments, "--out", str(tmp_path / "third"), "--phase", "2"])
    with pytest.raises(ValueError, match="`init` must be the folder of an autoencoder, got none"):
        autoencoder.main([*arguments, "--out", str(tmp_path / "third"), "--phase", "2", "--init", "none"])


def test_taught_scenes_are_all_but_the_held_out_ones():
    scenes = taught_scenes(list(WORDS), pairs=20)
    kinds = Counter(scene.kind for scene in scenes)
    looks = len(WORDS) * len(STYLES) * len(COLORS)
    assert kinds["pair"] == 20
    assert 0.8 * looks < kinds["object"] == kinds["small"] == kinds["position"] / 4 < looks
    assert kinds["count"] < 2 * kinds["object"]  # not of "bread"
    assert not any(is_held_out(scene) for scene in scenes)
    assert len(set(scenes)) >= len(scenes) - 20  # pairs may come twice


def test_latents_are_encoded_once(art, tmp_path, monkeypatch):
    vae, scenes, path = (
        tiny().eval(),
        taught_scenes(art.objects, pairs=2)[:6],
        tmp_path / "out" / "latents.safetensors",
    )
    written = load_latents(path, vae, art, scenes)
    with torch.no_grad():
        expected = vae.encode(render(art, scenes)).latent * vae.config.scaling_factor
    torch.testing.assert_close(written.float(), expected, atol=2e-3, rtol=2e-3)
    with monkeypatch.context() as patch:
        patch.setattr(latents, "encode", lambda *_: pytest.fail("encoded again"))
        assert torch.equal(load_latents(path, vae, art, scenes), written)
    # Another encoder, or other scenes, and the file is written again.
    with torch.no_grad():
        vae.encoder.conv_out.weight.mul_(2)
    assert not torch.equal(load_latents(path, vae, art, scenes), written)
    assert len(load_latents(path, vae, art, scenes[:3])) == 3


def test_batches_of_latents_have_the_kinds_and_captions_of_their_scenes(art):
    scenes = taught_scenes(art.objects, pairs=50)
    numbers = torch.arange(len(scenes)).view(-1, 1, 1, 1).half()
    batch = next(latent_batches(scenes, numbers, 64, seed=1, kinds={"pair": 3, "count": 1}))
    chosen = [scenes[int(row)] for row in batch["latents"].flatten()]
    kinds = Counter(scene.kind for scene in chosen)
    assert set(kinds) == {"pair", "count"}
    assert kinds["pair"] > kinds["count"]
    for scene, caption in zip(chosen, batch["text"], strict=True):
        assert scene.objects[0] in caption or plural(scene.objects[0]) in caption
    again = next(latent_batches(scenes, numbers, 64, seed=1, kinds={"pair": 3, "count": 1}))
    assert again["text"] == batch["text"]


def test_the_transformer_is_trained_on_latents_and_becomes_a_pipeline(pack, tmp_path, monkeypatch):
    folder = tmp_path / "vae"
    tiny_vae = tiny()
    tiny_vae.save_pretrained(folder)
    monkeypatch.setattr(transformer, "taught_scenes", lambda objects: taught_scenes(objects, pairs=4)[:40])
    monkeypatch.setattr(transformer, "BATCH_SIZE", {"cpu": 2, "cuda": 2})
    monkeypatch.setattr(transformer, "KINDS", {"object": 1})
    monkeypatch.setattr(transformer, "SAMPLES", 1)
    small = {"max_steps": 2, "sample_steps": 1, "compile": False}
    monkeypatch.setattr(transformer, "SETTINGS", {**transformer.SETTINGS, **small})
    monkeypatch.setattr(transformer, "make_transformer", tiny_transformer)
    out = tmp_path / "out"
    transformer.main(["--data", str(pack), "--vae", str(folder), "--out", str(out), "--minutes", "5"])
    pipe = SanaPipeline.from_pretrained(out / "pipeline", dtype=torch.float32)
    assert pipe.vae.dtype == torch.float32
    assert load_file(out / "pipeline" / "transformer" / WEIGHTS)["proj_out.weight"].dtype == torch.bfloat16
    image = pipe("a cat on a red background", num_inference_steps=1, height=256, width=256, output_type="pt").images
    assert image.shape == (1, 3, 256, 256)
    assert (out / "sana" / "log.jsonl").exists()
    known = (out / "pipeline" / "words.txt").read_text().split()
    assert {"cats", "dog", "two", "background", "purple"} <= set(known)
    assert not any("," in word for word in known)


def tiny_transformer():
    sizes = {"num_layers": 1, "caption_channels": 192, "sample_size": 8}
    return SanaTransformer2DModel(**TRANSFORMER | sizes)


def test_the_judge_learns_scenes_and_writes_checks(pack, tmp_path):
    vae, out = tmp_path / "vae", tmp_path / "judge"
    tiny().save_pretrained(vae)
    arguments = ["--data", str(pack), "--vae", str(vae), "--out", str(out), "--results", str(tmp_path / "results")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "BATCH_SIZE", 8)
        patch.setattr(judge, "STORE", 16)
        patch.setattr(judge, "HELD_OUT", {"object": 2, "position": 1, "pair": 1, "count": 1})
        judge.main([*arguments, "--steps", "2"])
    checks = read_checks(out / "checks.jsonl")
    assert Counter(check.tag for check in checks) == {
        "single_object": 2,
        "position": 1,
        "two_object": 1,
        "counting": 1,
    }
    report = json.loads(next((tmp_path / "results").rglob("emoji_judge.json")).read_text())
    assert set(report["true_images"]) == set(report["through_autoencoder"]) > {"object", "objects_of_a_pair", "number"}
    assert EmojiProbe.from_pretrained(out).answers["number"] == ("1", "2", "3")


def test_answers_of_the_judge_say_what_a_scene_shows():
    probe = EmojiProbe(list(WORDS), list(COLORS), list(STYLES), max_objects=3)
    scenes = [
        Scene(("dog",), "flat", "blue", "top"),
        Scene(("cat", "dog"), "3d", "red"),
        Scene(("key",) * 3, "flat", "white"),
        Scene(("key",), "flat", "white", "center"),
    ]
    found = {name: column.tolist() for name, column in judge.answers(probe, scenes).items()}
    assert found["first"] == [WORDS.index(word) for word in ("dog", "cat", "key", "key")]
    assert found["second"] == [-1, WORDS.index("dog"), -1, -1]
    assert found["number"] == [0, 1, 2, 0]
    assert found["place"] == [probe.answers["place"].index("top"), -1, -1, probe.answers["place"].index("")]
    assert [judge.check(scene, 5)["include"] for scene in scenes] == [
        [{"class": "dog", "place": "top"}],
        [{"class": "cat"}, {"class": "dog", "position": ["right of", 0]}],
        [{"class": "key", "count": 3}],
        [{"class": "key"}],
    ]


@pytest.mark.parametrize(
    ("answer", "word", "right"),
    [
        ("a hedgehog", "hedgehog", True),
        ("Hedgehogs!", "hedgehog", True),
        ("porcupine", "hedgehog", True),
        ("a fox or a hedgehog", "hedgehog", False),
        ("hedgehog / fox", "hedgehog", True),
        ("the water-melon", "watermelon", True),
        ("car", "police car", False),
        ("scarf", "car", False),
        ("", "car", False),
    ],
)
def test_blind_answers(answer, word, right):
    assert blind.is_named(answer, word, json.loads(blind.SYNONYMS.read_text())) == right


def test_blind_score(tmp_path):
    scenes = blind.blind_scenes()
    assert len(scenes) == 50
    assert all(len(scene.objects) == 1 for scene in scenes)
    lines = [f"{i}: {scene.objects[0]}" for i, scene in enumerate(scenes, start=1)]
    lines[3] = "4. a thing"
    (tmp_path / "answers.txt").write_text("\n".join(lines[:49]) + "\n")
    blind.main(["score", str(tmp_path / "answers.txt"), "--out", str(tmp_path)])
    report = json.loads((tmp_path / "blind.json").read_text())
    assert (report["images"], report["named"]) == (50, 48)
    assert list(report["not_named"].values()) == ["a thing", ""]
    (tmp_path / "answers.txt").write_text("hedgehog\n")
    with pytest.raises(ValueError, match="line 1"):
        blind.read_answers(tmp_path / "answers.txt")


def test_synonyms_are_of_objects():
    synonyms = json.loads(blind.SYNONYMS.read_text())
    assert set(synonyms) < set(OBJECTS)
    # What names another object as well is accepted only where the two look alike.
    shared = {(word, name) for word, names in synonyms.items() for name in names if name in OBJECTS}
    assert shared == {("soccer ball", "football"), ("tropical fish", "fish")}


def test_the_sheet_numbers_its_images(tmp_path):
    blind.write_sheet(torch.zeros(12, 3, 64, 64), tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (10 * 64, 2 * (64 + 24))
    assert sheet.getpixel((32, 24 + 32)) == (128, 128, 128)


def test_more_held_out_scenes_than_there_are(art):
    with pytest.raises(ValueError, match=r"`kinds` .* 9 of 'object'"):
        held_out_scenes(art.objects, {"object": 9})
    with pytest.raises(ValueError, match=r"`objects` must have scenes of .* that are held out, got \['cat'\]"):
        held_out_scenes(["cat"], {"object": 1})  # of its twenty none is
