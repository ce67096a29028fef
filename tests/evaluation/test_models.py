"""CLIP and detectors of transformers, tiny and random: that they are asked and read rightly."""

import pytest
import torch
from PIL import Image
from transformers import (
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    OwlViTTextConfig,
    OwlViTVisionConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from diffusers_sana.evaluation.checks import Check, Wanted
from diffusers_sana.evaluation.clip import Clip
from diffusers_sana.evaluation.detector import COLORS, Detector
from diffusers_sana.evaluation.images import to_images
from tests.evaluation.tiny_models import TEXT, VISION, WIDTHS, tokenizer, write_clip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def closed_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("yolos")
    config = YolosConfig(
        **WIDTHS, image_size=[32, 32], patch_size=16, num_detection_tokens=5, id2label={0: "cat", 1: "dog"}
    )
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def zero_shot_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("owlvit")
    text, vision = OwlViTTextConfig(**WIDTHS, **TEXT), OwlViTVisionConfig(**WIDTHS, **VISION)
    config = OwlViTConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    OwlViTForObjectDetection(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    OwlViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 32)


def test_clip_scores(clip_folder, images):
    """100 times the cosine, as the model itself has it before its temperature, and none below zero."""
    clip, texts = Clip(clip_folder), ["a red cat", "dog", "one two three four five six seven eight nine"]
    scores = clip.scores(images, texts)
    tokens = clip.tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
    pixels = clip.image_processor(to_images(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = clip.model(**tokens, pixel_values=pixels)
    cosines = output.logits_per_image.diagonal() / clip.model.logit_scale.exp()
    assert torch.allclose(scores, 100 * cosines.clamp(min=0), atol=1e-4)
    assert clip.choose(to_images(images)[0], texts) == output.logits_per_image[0].argmax()


def test_clip_that_is_not_there():
    with pytest.raises(OSError, match="no/such/clip"):
        Clip("no/such/clip")


@pytest.mark.parametrize("kind", ["closed_folder", "zero_shot_folder"])
def test_detections(kind, request, images):
    detector = Detector(request.getfixturevalue(kind), threshold=0.0)
    check = Check("two_object", "a cat and a dog", 0, (Wanted("cat"), Wanted("dog")))
    detector.check_labels([check])
    observations = detector.observe(images, [check] * 3)
    assert len(observations) == 3
    for observation in observations:
        assert {one.label for one in observation.objects} <= {"cat", "dog"}
        for one in observation.objects:
            assert 0 <= one.score <= 1
            assert -1 < one.box[0] <= one.box[2] < 2, "in fractions of the image"
            assert one.color is None
    assert any(observation.objects for observation in observations)
    detector.threshold = 1.0
    assert not any(observation.objects for observation in detector.observe(images, [check] * 3))


def test_colors_are_those_of_the_box(closed_folder, clip_folder, images):
    detector = Detector(closed_folder, Clip(clip_folder))
    check = Check("colors", "a red cat", 0, (Wanted("cat", color="red"),))
    box = {"xmin": 4, "ymin": 8, "xmax": 20, "ymax": 30}
    detector.find = lambda image, threshold: [{"label": label, "score": 0.5, "box": box} for label in ("cat", "dog")]
    asked = []

    def choose(image: Image.Image, texts: list[str]) -> int:
        asked.append((image.size, texts[0]))
        return 3

    detector.clip.choose = choose
    cat, dog = detector.observe(images[:1], [check])[0].objects
    assert asked == [((16, 22), "a photo of a red cat")]
    assert (cat.color, dog.color) == (COLORS[3], None)
    assert cat.box == pytest.approx((4 / 32, 8 / 40, 20 / 32, 30 / 40))


def test_what_cannot_be_told(closed_folder, zero_shot_folder, clip_folder):
    unicorn = Check("single", "a unicorn", 0, (Wanted("unicorn"),))
    with pytest.raises(ValueError, match=r"it knows no \['unicorn'\]"):
        Detector(closed_folder).check_labels([unicorn])
    Detector(zero_shot_folder).check_labels([unicorn])
    with pytest.raises(ValueError, match="`clip` must be given"):
        Detector(closed_folder).check_labels([Check("colors", "a red cat", 0, (Wanted("cat", color="red"),))])
    with pytest.raises(ValueError, match="`background` or `style`"):
        Detector(closed_folder).check_labels([Check("single", "a cat", 0, (Wanted("cat"),), style="flat")])
    with pytest.raises(ValueError, match="`model` must be an object detection model"):
        Detector(clip_folder)
