"""Captioning a folder, with stand-ins and with tiny models of two families."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from diffusers_sana import VilaUPipeline
from diffusers_sana.images import read_image
from diffusers_sana.training.data.captions import Caption, caption_line, read_captions
from diffusers_sana.training.recipes import captions as recipe
from diffusers_sana.training.recipes.captions import (
    CaptionFile,
    TransformersCaptioner,
    caption_with,
    load_captioner,
)
from examples.caption_images import main
from tests.evaluation.tiny_models import VISION, WIDTHS, write_clip
from tests.models.vila_u.tiny import tiny_model
from tests.models.vila_u.tiny_processor import tiny_processor, tiny_tokenizer
from tests.training.tiny import write_image_folder


TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %} a:"
)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    """LLaVA with one layer each; its weights are wide, so that images are told apart."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**WIDTHS, **VISION),
        text_config=LlamaConfig(**WIDTHS, vocab_size=len(tokenizer), num_key_value_heads=2),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
        tokenizer,
        patch_size=16,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def folder(tmp_path):
    """Five images of different colors, of which all but "2.png" came with a caption."""
    write_image_folder(tmp_path, [(40, 40), (40, 60), (60, 40), (40, 40), (32, 32)])
    return tmp_path


NAMES = [f"{i}.png" for i in range(5)]


def numbers(images):
    """A stand-in that says how bright an image is."""
    return [f"brightness {image.getpixel((0, 0))[0]}" for image in images]


def test_a_stopped_run_goes_on_where_it_was(folder):
    seen = []

    def stops(images):
        if seen:
            raise KeyboardInterrupt
        seen.extend(images)
        return numbers(images)

    with pytest.raises(KeyboardInterrupt):
        caption_with(CaptionFile(folder), NAMES, "m", stops, batch_size=2)
    with open(folder / "captions.jsonl", "a") as file:
        file.write('{"file_name": "2.png", "captions": [{"mod')  # the kill came within a line
    file = CaptionFile(folder)
    assert file.missing(NAMES, "m") == NAMES[2:]
    caption_with(file, NAMES, "m", lambda images: seen.extend(images) or numbers(images), batch_size=2)
    assert len(seen) == 5
    found = read_captions(folder / "captions.jsonl")
    assert {name: [c.text for c in captions] for name, captions in found.items()} == {
        name: [f"brightness {40 * i}"] for i, name in enumerate(NAMES)
    }


def test_captions_of_one_model_are_replaced(tmp_path):
    file = CaptionFile(tmp_path)
    file.add([("b.png", Caption("m", "old")), ("a.png", Caption("m", "a")), ("b.png", Caption("n", "other"))])
    file.add([("b.png", Caption("m", "näu", 30.0))])
    for captions in (file.captions, read_captions(file.path), CaptionFile(tmp_path).captions):
        assert {(c.model, c.text, c.clip_score) for c in captions["b.png"]} == {("n", "other", None), ("m", "näu", 30)}
    lines = file.path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file_name"] for line in lines] == ["a.png", "b.png"]
    assert lines[0] + "\n" == caption_line("a.png", [Caption("m", "a")])


def test_transformers_captions_do_not_depend_on_the_batch(llava_folder, folder):
    captioner = TransformersCaptioner(llava_folder, "What?", 6, "cpu", torch.float32)
    images = [read_image(folder / name) for name in NAMES]
    together = captioner(images)
    assert together == [captioner([image])[0] for image in images]
    assert len(set(together)) > 1
    assert not any("USER" in text or "What" in text for text in together)  # the answer alone


def test_vila_u_captions_from_either_folder(tmp_path, folder):
    model, processor = tiny_model(seed=2), tiny_processor()
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    pipe = VilaUPipeline(model=model, processor=processor)
    pipe.save_pretrained(tmp_path / "pipeline")
    images = [read_image(folder / name) for name in NAMES[:2]]
    expected = pipe.chat(images, "What?", max_new_tokens=8, do_sample=False)
    for name in ("plain", "pipeline"):
        captioner = load_captioner(str(tmp_path / name), "What?", 8, "cpu", torch.float32)
        assert isinstance(captioner, TransformersCaptioner) is (name == "plain")
        assert captioner(images) == expected
    assert len(set(expected)) == 2


def test_main_captions_scores_and_skips(folder, llava_folder, clip_folder, monkeypatch):
    arguments = ["--data", str(folder), "--max-new-tokens", "3", "--batch-size", "2"]
    main([*arguments, "--models", llava_folder])
    first = read_captions(folder / "captions.jsonl")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    originals = {row["file_name"]: row["text"] for row in map(json.loads, lines)}
    for name, captions in first.items():
        said = {caption.model: caption.text for caption in captions}
        assert said.get("original", "") == originals[name]  # "2.png" has none
        assert llava_folder in said
        assert all(caption.clip_score is None for caption in captions)
    monkeypatch.setattr(recipe, "load_captioner", None)  # nothing is left to caption
    main([*arguments, "--models", llava_folder, "--clip", clip_folder])
    clip, scored = recipe.Clip(clip_folder), read_captions(folder / "captions.jsonl")
    assert scored.keys() == first.keys() == set(NAMES)
    for name, captions in scored.items():
        image = clip.image_features([read_image(folder / name)])
        assert {(c.model, c.text) for c in captions} == {(c.model, c.text) for c in first[name]}
        for caption in captions:
            cosine = (clip.text_features([caption.text]) @ image.T).item()
            assert caption.clip_score == pytest.approx(max(0, 100 * cosine), abs=1e-3)


def test_captions_are_of_their_image_prompt_and_model(folder, llava_folder, clip_folder, monkeypatch):
    asked = []

    def load(*_):
        return lambda images: [asked.append(1) or f"caption {len(asked)}" for _ in images]

    monkeypatch.setattr(recipe, "load_captioner", load)

    def run(*options):
        asked.clear()
        main(["--data", str(folder), "--models", llava_folder, *options])
        return len(asked)

    assert run() == 5
    assert run() == 0
    Image.new("RGB", (40, 40), "red").save(folder / "0.png")
    assert run("--clip", clip_folder) == 1
    assert run("--prompt", "Which colors?") == 5
    captions = read_captions(folder / "captions.jsonl")["1.png"]
    assert [caption.clip_score is None for caption in captions if caption.model == llava_folder] == [True]
    with open(folder / "captions.jsonl", "a") as file:  # of another program
        file.write(caption_line("1.png", [Caption(llava_folder, "as it was")]))
    assert run("--prompt", "Which colors?") == 0
    lines = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(lines.replace("two dogs", "two cats"))
    run("--prompt", "Which colors?")
    found = read_captions(folder / "captions.jsonl")["1.png"]
    assert {c.text for c in found} == {"as it was", "two cats on a blue hill"}


def test_main_refuses_a_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match="`data` must be a folder with images"):
        main(["--data", str(tmp_path)])


def test_transparent_images_are_laid_over_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
