"""Visual question answering: DPG-Bench with answers that are known, and VQAScore of a tiny LLaVA."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from diffusers_sana.evaluation import measure
from diffusers_sana.evaluation.dpg import Question, Questioned, credited, read_questions
from diffusers_sana.evaluation.images import to_images
from diffusers_sana.evaluation.judges import judged
from diffusers_sana.evaluation.significance import interval_of_share
from diffusers_sana.evaluation.vqa import QUESTION, VqaModel, make_vqa, probabilities_of_yes, vqa_scores
from tests.evaluation.tiny_models import write_vqa


HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
ROWS = [
    'pair,"a red cat, beside a dog",,1,0,entity,whole,entity - whole (cat),Is there a cat?',
    'pair,"a red cat, beside a dog",,2,1,attribute,color,"attribute - color (cat, red)",Is the cat red?',
    'pair,"a red cat, beside a dog",,3,0,entity,whole,entity - whole (dog),Is there a dog?',
    'pair,"a red cat, beside a dog",,4,"1, 3",relation,spatial,"relation - spatial (cat, dog, beside)",Beside a dog?',
    "one,a dog,,1,0,entity,whole,entity - whole (dog),Is there a dog?",
]


def write(folder, rows=ROWS, head=HEAD):
    path = folder / "dpg_bench.csv"
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path


def test_questions_are_read(tmp_path):
    pair, one = read_questions(write(tmp_path))
    assert (pair.name, pair.prompt) == ("pair", "a red cat, beside a dog")
    assert [question.parents for question in pair.questions] == [(), (1,), (), (1, 3)]
    assert pair.questions[1] == Question(2, "Is the cat red?", "attribute - color", (1,))
    assert one == Questioned("one", "a dog", (Question(1, "Is there a dog?", "entity - whole"),))


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        (ROWS, HEAD.replace("dependency,", ""), r"lacks \['dependency'\]"),
        ([], HEAD, "at least one question"),
        ([ROWS[0].replace(",1,0,", ",one,0,")], HEAD, r"dpg_bench\.csv, line 2: must be a row of DPG-Bench"),
        ([ROWS[0][:20]], HEAD, r"dpg_bench\.csv, line 2: must be a row"),
        ([ROWS[0], ROWS[0]], HEAD, "line 3: `proposition_id` 1 of 'pair' is there twice"),
        ([ROWS[1]], HEAD, r"`dependency` of 'pair' must name its questions; there is no \{1\}"),
        ([ROWS[-1].replace("a dog,", ",", 1)], HEAD, "`text` of 'one' must be a prompt"),
    ],
)
def test_what_is_no_file_of_the_benchmark(tmp_path, rows, head, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path, rows, head))


def test_a_question_counts_where_its_parents_do(tmp_path):
    questions = read_questions(write(tmp_path))[0].questions
    yes = dict.fromkeys(range(1, 5), True)
    assert credited(questions, yes) == yes
    assert credited(questions, yes | {1: False}) == {1: False, 2: False, 3: True, 4: False}
    chain = [Question(1, "?", "c"), Question(2, "?", "c", (1,)), Question(3, "?", "c", (2,))]
    assert credited(chain, {1: False, 2: True, 3: True}) == {1: False, 2: False, 3: False}
    assert credited(chain[::-1], {1: False, 2: True, 3: True}) == {1: False, 2: False, 3: True}  # in their order


def test_scores_of_images(tmp_path):
    """Red images show the cat and that it is red, and all show the dog; nothing is beside anything."""
    prompts = read_questions(write(tmp_path))
    asked = []

    def vqa(images, questions):
        asked.append((tuple(images.shape), list(questions)))
        is_red = bool(images[0, 0].mean() > 0.5)
        return [
            "Yes, one." if "dog?" in q and "Is" in q else "yes" if is_red and "cat" in q else "No" for q in questions
        ]

    paths = []
    for name, color in (("0", (255, 0, 0)), ("1", (0, 0, 0)), ("2", (0, 0, 0))):
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (8, 6), color).save(paths[-1])
    found = measure.ask_questions(paths, [prompts[0], prompts[0], prompts[1]], vqa)
    assert asked[0] == ((4, 3, 6, 8), [question.text for question in prompts[0].questions])
    assert found["scores"] == [75, 25, 100]
    assert found["answers"][1] == {1: False, 2: False, 3: True, 4: False}
    shares = {name: (row["share"], row["of"]) for name, row in found["by_category"].items()}
    assert shares == {
        **{"entity": (0.8, 5), "entity - whole": (0.8, 5), "attribute": (0.5, 2), "attribute - color": (0.5, 2)},
        **{"relation": (0, 2), "relation - spatial": (0, 2)},
    }
    assert found["by_category"]["entity"]["interval"] == list(interval_of_share(4, 5))


def test_answers_are_texts_or_probabilities():
    assert probabilities_of_yes(["yes", " Yes.", "yesterday", "no", ""], 5).tolist() == [1, 1, 0, 0, 0]
    assert probabilities_of_yes([0.25, True], 2).tolist() == [0.25, 1]
    for wrong in ([0.5], [0.5, 1.5], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="must answer 2 questions"):
            probabilities_of_yes(wrong, 2)


def brightness(images, questions):
    """A function for `--vqa`: says yes to bright images, if asked whether they show something."""
    return [
        float(image.mean()) if "show" in question else 0.0 for image, question in zip(images, questions, strict=True)
    ]


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 32)


def test_a_function_asks_for_the_prompt(images):
    vqa = make_vqa("tests.evaluation.test_vqa:brightness")
    assert torch.allclose(judged(vqa_scores(vqa), images, ["a", "b", "c"]), images.mean((1, 2, 3)))
    with pytest.raises(ValueError, match="`vqa` 'no_module:f' must be a function"):
        make_vqa("no_module:f")


@pytest.fixture(scope="module")
def vqa_folder(tmp_path_factory):
    return write_vqa(tmp_path_factory.mktemp("vqa"))


def test_vqascore_is_the_probability_of_yes(vqa_folder, images):
    """Of both tokens of the word, at the first place of the answer; the same in batches and one by one."""
    texts = ["a red cat", "dog", "the cat is there"]
    vqa = make_vqa(vqa_folder)
    scores = judged(vqa_scores(vqa), images, texts)
    assert len(set(scores.tolist())) == 3
    model = AutoModelForImageTextToText.from_pretrained(vqa_folder).eval()
    encode = vqa.processor.tokenizer.convert_tokens_to_ids
    for image, text, score in zip(images, texts, scores.tolist(), strict=True):
        pixels = vqa.processor.image_processor(to_images(image[None]), return_tensors="pt")["pixel_values"]
        prompt = f"{'<image>' * 4} {QUESTION.format(text)} :"
        tokens = vqa.processor.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            odds = model(**tokens, pixel_values=pixels).logits[0, -1].softmax(-1)
        assert score == pytest.approx(float(odds[encode("yes")] + odds[encode("Yes")]), rel=1e-4)
        yes, no = float(odds[encode("yes")] + odds[encode("Yes")]), float(odds[encode("no")])
        assert float(vqa(image[None], [QUESTION.format(text)])) == pytest.approx(yes / (yes + no), rel=1e-4)
    vqa.batch_size = 2
    assert torch.allclose(vqa.scores(images, texts), scores, rtol=1e-4)


def test_models_that_cannot_answer(tmp_path):
    with pytest.raises(ValueError, match=r"a token for 'no', but .* has none"):
        VqaModel(write_vqa(tmp_path / "mute", words=("yes",)))
    with pytest.raises(ValueError, match="with a chat template"):
        VqaModel(write_vqa(tmp_path / "plain", template=None))
