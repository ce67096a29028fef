"""Judges, with stand-ins for packages and weights that are not there, and the best of several images."""

import sys
from types import SimpleNamespace

import pytest
import torch

import diffusers_sana
from diffusers_sana.evaluation.best_of import best_of
from diffusers_sana.evaluation.checks import Check, Wanted
from diffusers_sana.evaluation.clip import Clip
from diffusers_sana.evaluation.judges import _MAKERS, PickScore, SceneJudge, judged, make_judge, mixed
from diffusers_sana.evaluation.observations import Detection, Observation
from diffusers_sana.training.recipes.post_training_options import JUDGES
from tests import tiny
from tests.evaluation.tiny_models import write_clip
from tests.training.tiny import redness


PROMPTS = ["a cat", "a dog", "a cat"]


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def brightness(images, prompt):
    """What the stand-ins return: of each PIL image its mean, and more for cats."""
    return [sum(image.resize((1, 1)).getpixel((0, 0))) / 765 + ("cat" in prompt) for image in images]


def test_scenes_score_the_fraction_of_what_is_right(images):
    check = Check("two_object", "a cat", 0, (Wanted("cat"),), total=2, background="red")
    seen = Observation((Detection("cat", 0.9, (0, 0, 1, 1)),), "red")
    judge = SceneJudge([check], observe=lambda images, checks: [seen] * len(images))
    assert judge(images, ["a cat"] * 3).tolist() == pytest.approx([2 / 3] * 3)  # not the number
    with pytest.raises(ValueError, match="'a dog', which has none"):
        judge(images, PROMPTS)
    scores = make_judge("scenes", [check])(images, ["a cat"] * 3)  # the bundled network
    assert scores.shape == (3,)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_pickscore_is_the_scaled_cosine(images, tmp_path):
    folder = write_clip(tmp_path / "clip")
    clip, pick = Clip(folder), PickScore(folder, processor=folder)
    expected = clip.cosines(images, PROMPTS) * clip.model.logit_scale.exp().detach()
    assert torch.allclose(judged(pick.scores, images, PROMPTS), expected)
    assert torch.allclose(clip.scores(images, PROMPTS), 100 * clip.cosines(images, PROMPTS).clamp(min=0))


def test_hpsv2_scores_the_images_of_a_prompt_together(images, monkeypatch):
    calls = []

    def score(images, prompt, hps_version):
        calls.append((len(images), prompt, hps_version))
        return brightness(images, prompt)

    monkeypatch.setitem(sys.modules, "hpsv2", SimpleNamespace(score=score))
    scores = judged(make_judge("hpsv2"), images, PROMPTS)
    assert calls == [(2, "a cat", "v2.1"), (1, "a dog", "v2.1")]
    assert (scores > 1).tolist() == [True, False, True]


def test_image_reward_may_return_a_bare_number(images, monkeypatch):
    def score(prompt, images):
        scores = brightness(images, prompt)
        return scores if len(scores) > 1 else scores[0]

    loaded = []

    def load(name, device):
        loaded.append((name, device))
        return SimpleNamespace(score=score)

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=load))
    scores = judged(make_judge("imagereward", device="cpu"), images, PROMPTS)
    assert loaded == [("ImageReward-v1.0", "cpu")]
    assert (scores > 1).tolist() == [True, False, True]


def test_names_and_mixtures(images, monkeypatch):
    assert {*_MAKERS, "scenes"} == set(JUDGES)
    judge = make_judge("tests.training.tiny:redness")
    both = mixed([judge, lambda images, prompts: [1, 2, 3]], [2.0, 0.5])
    assert torch.allclose(both(images, PROMPTS), 2 * redness(images, PROMPTS) + torch.tensor([0.5, 1.0, 1.5]))
    monkeypatch.setitem(sys.modules, "hpsv2", None)
    for name, message in (
        ("hpsv2", "judge hpsv2 needs a package: `pip install hpsv2`"),
        ("beauty", "a judge must be 'scenes', one of"),
        ("tests.training.tiny:beauty", "must be a function that can be imported"),
        ("scenes", "`checks` must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            make_judge(name)
    with pytest.raises(ValueError, match="`weights` must be as many as `judges`, 1, got 2"):
        mixed([judge], [1.0, 2.0])


def test_best_of_returns_the_best_image_with_its_seed():
    pipe = tiny.pipeline(diffusers_sana)
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "complex_human_instruction": None}
    found = best_of(pipe, ["a cat", "two dogs"], redness, n=3, seed=7, batch_size=2, **settings)
    assert found.scores.shape == (2, 3)
    assert found.all_seeds == [[7, 8, 9], [10, 11, 12]]
    best = found.scores.argmax(1)
    assert found.seeds == [seeds[at] for seeds, at in zip(found.all_seeds, best.tolist(), strict=True)]
    assert found.scores.std(1).min() > 0
    for prompt, seed, image, scores in zip(
        ["a cat", "two dogs"], found.seeds, found.images, found.scores, strict=True
    ):
        again = pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="pt", **settings).images
        assert redness(again, [prompt]).item() == pytest.approx(scores.max().item(), abs=5e-3)  # 8-bit images
        assert image.size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"prompt": []}, ValueError, "`prompt` must be a string or several"),
        ({"prompt": [3]}, TypeError, "`prompt` must be a string or several"),
        ({"n": 0}, ValueError, "`n` must be at least 1"),
        ({"n": 1.5}, TypeError, "`n` must be an integer"),
        ({"judge": "red"}, TypeError, "`judge` must be a function"),
        ({"output_type": "pt"}, ValueError, "`output_type` must not be given"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"pipe": lambda **kwargs: ([[0.0]],)}, ValueError, "`pipe` must return one image per prompt"),
    ],
)
def test_best_of_errors(arguments, kind, message):
    defaults = {"pipe": lambda **kwargs: ([],), "prompt": "a cat", "judge": redness, "n": 1}
    with pytest.raises(kind, match=message):
        best_of(**defaults | arguments)
