"""Judges: functions from images and their prompts to one score each, for rewards and for the choice among images.

A judge is any callable `(images, prompts) -> scores`, with images `[N, 3, H, W]` in [0, 1], N prompts and N scores, of
which higher ones are better. `Clip.scores` is one. Those of other packages are imported when they are made.

Legend: N images, H/W height and width.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusers_sana.checkpoints import EMOJI_PROBE
from diffusers_sana.evaluation.checks import Check, verify
from diffusers_sana.evaluation.clip import Clip
from diffusers_sana.evaluation.emoji_probe import EmojiProbe
from diffusers_sana.evaluation.images import to_images
from diffusers_sana.evaluation.measure import Observe
from diffusers_sana.evaluation.optional import require
from diffusers_sana.evaluation.vqa import VqaModel, import_function


Judge = Callable[[Tensor, Sequence[str]], Any]
INSTEAD = "choose another judge"


class SceneJudge:
    """The fraction of what a prompt asks for that its image shows: objects, number, colors, places.

    Args:
        checks: what the images of prompts must show; all prompts that will be judged.
        observe: sees what images show, such as `Detector.observe`; None: the bundled network for emoji.
        device: where the bundled network runs.
    """

    def __init__(self, checks: Sequence[Check], observe: Observe | None = None, device: str = "cpu"):
        self.checks = {check.prompt: check for check in checks}
        if observe is None:
            probe = EmojiProbe.from_pretrained(EMOJI_PROBE).eval().to(device)
            observe = lambda images, checks: probe.observe(images.to(device))  # noqa: E731
        self.observe = observe

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores `[N]` in [0, 1]; 1 where everything is right.

        Raises:
            ValueError: a prompt has no check.
        """
        if missing := [prompt for prompt in prompts if prompt not in self.checks]:
            raise ValueError(f"`prompts` must have checks, got {missing[0]!r}, which has none. Add it to the checks.")
        asked = [self.checks[prompt] for prompt in prompts]
        verdicts = [verify(check, seen) for check, seen in zip(asked, self.observe(images, asked), strict=True)]
        return torch.tensor([sum(verdict.values()) / len(verdict) for verdict in verdicts])


class PickScore(Clip):
    """PickScore (arXiv 2305.01569), a CLIP tuned to what people prefer: its scale times the cosine, about 15 to 25.

    Args:
        model: folder or Hub id of the CLIPModel.
        processor: folder or Hub id of its tokenizer and image processor.
        device: where it runs.

    Raises:
        OSError: there is no such model.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str = "cpu",
    ):
        super().__init__(model, device, processor)

    @torch.no_grad()
    def scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Scores of images and their own texts, `[N]`."""
        return self.model.logit_scale.exp().cpu() * self.cosines(images, texts)


class HPSv2:
    """Human preference score v2 (arXiv 2306.09341), by the `hpsv2` package, about 0.2 to 0.35.

    Args:
        version: "v2.1" or "v2.0".

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, version: str = "v2.1"):
        self.package, self.version = require("hpsv2", "judge hpsv2", INSTEAD), version

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores `[N]`."""
        # The package reads its weights at every call, so the images of one prompt are scored in one.
        return _by_prompt(images, prompts, partial(self.package.score, hps_version=self.version))


class ImageReward:
    """ImageReward (arXiv 2304.05977), by the `image-reward` package, about -2 to 2.

    Args:
        model: name or file that `ImageReward.load` takes.
        device: where it runs.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, model: str = "ImageReward-v1.0", device: str = "cpu"):
        self.model = require("ImageReward", "judge imagereward", INSTEAD).load(model, device=device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores `[N]`."""
        return _by_prompt(images, prompts, lambda group, prompt: self.model.score(prompt, group))


def _by_prompt(
    images: Tensor, prompts: Sequence[str], score: Callable[[list[Image.Image], str], float | Sequence[float]]
) -> Tensor:
    """Scores `[N]` by a function of all images of one prompt, which may return a bare number for one image."""
    places = defaultdict(list)
    for place, prompt in enumerate(prompts):
        places[prompt].append(place)
    shown, scores = to_images(images), torch.empty(len(images))
    for prompt, at in places.items():
        with torch.no_grad():
            found = score([shown[i] for i in at], prompt)
        scores[at] = torch.as_tensor(found, dtype=torch.float32).reshape(len(at))
    return scores


# Name of a judge that needs no argument -> function of the device that makes it.
_MAKERS: dict[str, Callable[[str], Judge]] = {
    "clip": lambda device: Clip("openai/clip-vit-large-patch14", device).scores,
    "hpsv2": lambda device: HPSv2(),
    "imagereward": lambda device: ImageReward(device=device),
    "pickscore": lambda device: PickScore(device=device).scores,
    "vqascore": lambda device: VqaModel("llava-hf/llava-1.5-7b-hf", device).scores,
}


def make_judge(name: str, checks: Sequence[Check] = (), device: str = "cpu") -> Judge:
    """A judge by its name.

    Args:
        name: "scenes", the bundled network for emoji; "clip", "hpsv2", "imagereward", "pickscore" or
            "vqascore"; or "module:function", any function of images and prompts.
        checks: for "scenes".
        device: where it runs.

    Raises:
        ValueError: there is no such judge, its package is not installed, or "scenes" has no checks.
        OSError: the weights of the judge cannot be had.
    """
    if name == "scenes":
        if not checks:
            raise ValueError("`checks` must be given for judge 'scenes', got none. Pass a file of checks as prompts.")
        return SceneJudge(checks, device=device)
    if name in _MAKERS:
        return _MAKERS[name](device)
    if not name.partition(":")[2]:
        raise ValueError(f"a judge must be 'scenes', one of {sorted(_MAKERS)} or 'module:function', got {name!r}.")
    return import_function(name, "judge")


def mixed(judges: Sequence[Judge], weights: Sequence[float]) -> Judge:
    """The judge whose score is the weighted sum of the scores of several."""
    if len(judges) != len(weights):
        raise ValueError(f"`weights` must be as many as `judges`, {len(judges)}, got {len(weights)}.")

    def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = [weight * judged(each, images, prompts) for each, weight in zip(judges, weights, strict=True)]
        return torch.stack(scores).sum(0)

    return judge


def judged(judge: Judge, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The scores of a judge, `[N]` in fp32 on the CPU.

    Raises:
        TypeError: the judge cannot be called.
        ValueError: it does not return N finite numbers.
    """
    if not callable(judge):
        raise TypeError(f"a judge must be a function of images and prompts, got {type(judge).__name__}.")
    scores = torch.as_tensor(judge(images, list(prompts))).detach().float().cpu()
    if scores.shape != (len(images),):
        raise ValueError(
            f"a judge must return one score per image, shape ({len(images)},), got shape {tuple(scores.shape)}."
        )
    for prompt, score in zip(prompts, scores.tolist(), strict=True):
        if not math.isfinite(score):
            raise ValueError(f"a judge must return finite scores, got {score} for the prompt {prompt!r}.")
    return scores
