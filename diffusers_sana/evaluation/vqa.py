"""Visual question answering: how likely an image shows what a text says (VQAScore), and yes-or-no questions.

Legend: N images, H/W height and width.
"""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from diffusers_sana.evaluation.images import to_images
from diffusers_sana.evaluation.vision_language import VisionLanguageModel


Vqa = Callable[[Tensor, Sequence[str]], Any]
"""From images `[N, 3, H, W]` in [0, 1] and N questions to N answers: texts, or probabilities of "yes"."""

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
WORDS = ("yes", "no")


class VqaModel(VisionLanguageModel):
    """A vision-language model of transformers, with a chat template, that is asked yes-or-no questions.

    Args:
        model: folder or Hub id, such as "llava-hf/llava-1.5-7b-hf".
        device: where it runs.
        batch_size: questions at a time.

    Raises:
        OSError: there is no such model.
        ValueError: its tokenizer has no token for "yes" or for "no", or it has no chat template.
    """

    def __init__(self, model: str, device: str = "cpu", batch_size: int = 8):
        super().__init__(model, device)
        self.batch_size = batch_size
        if not self.processor.chat_template:
            raise ValueError(f"`vqa` must be a model with a chat template, but {model} has none; choose another")
        self.tokens = [_tokens_of(word, self.processor.tokenizer, model) for word in WORDS]

    @torch.no_grad()
    def probabilities(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """The probabilities that the answers begin with "yes" and with "no", in any case: `[N, 2]` on the CPU."""
        found = []
        for start in range(0, len(questions), self.batch_size):
            part = slice(start, start + self.batch_size)
            inputs = self.inputs(to_images(images[part]), questions[part])
            # Not one forward: this also sets the positions of tokens behind padding.
            answer = self.model.generate(
                **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            odds = answer.logits[0].float().softmax(-1).cpu()
            found.append(torch.stack([odds[:, tokens].sum(1) for tokens in self.tokens], dim=1))
        return torch.cat(found)

    def __call__(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """The probability of "yes", where the answer is yes or no: `[N]`."""
        yes, no = self.probabilities(images, questions).unbind(1)
        return yes / (yes + no).clamp_min(1e-12)

    def scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """VQAScore (arXiv 2404.01291): the probability of "yes" when asked whether the image shows the text, `[N]`."""
        return self.probabilities(images, [QUESTION.format(text) for text in texts])[:, 0]


def _tokens_of(word: str, tokenizer: Any, model: str) -> list[int]:
    """The tokens that are the word, with and without a capital letter and a space before it."""
    forms = [before + form for before in ("", " ") for form in (word, word.capitalize())]
    encoded = [tokenizer.encode(form, add_special_tokens=False) for form in forms]
    tokens = sorted({tokens[0] for tokens in encoded if len(tokens) == 1} - {tokenizer.unk_token_id})
    if not tokens:
        raise ValueError(f"`vqa` must be a model with a token for {word!r}, but {model} has none; choose another")
    return tokens


def probabilities_of_yes(answers: Any, of: int) -> Tensor:
    """Answers as probabilities of "yes" `[N]`: 1 for texts whose first word is "yes", 0 for others.

    Args:
        answers: N texts or numbers, of any `Vqa`.
        of: N.

    Raises:
        ValueError: they are not N, or a number is not in [0, 1].
    """
    if isinstance(answers, list | tuple) and all(isinstance(answer, str) for answer in answers):
        answers = [float(bool(re.match(r"\W*yes\b", answer, re.IGNORECASE))) for answer in answers]
    odds = torch.as_tensor(answers).detach().float().cpu()
    if odds.shape != (of,) or not ((odds >= 0) & (odds <= 1)).all():
        raise ValueError(f"`vqa` must answer {of} questions by texts or numbers in [0, 1], got {answers!r}")
    return odds


def vqa_scores(vqa: Vqa) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """The judge of images and their prompts that asks `vqa` whether the image shows the prompt."""
    if isinstance(vqa, VqaModel):
        return vqa.scores
    return lambda images, texts: probabilities_of_yes(
        vqa(images, [QUESTION.format(text) for text in texts]), len(texts)
    )


def make_vqa(name: str, device: str = "cpu") -> Vqa:
    """Visual question answering by its name: "module:function", or a folder or Hub id for `VqaModel`.

    Raises:
        OSError, ValueError: there is no such function or model, or it cannot answer.
    """
    if re.fullmatch(r"[A-Za-z_][\w.]*:\w+", name):
        return import_function(name, "`vqa`")
    return VqaModel(name, device)


def import_function(name: str, argument: str) -> Callable[..., Any]:
    """The function "module:function".

    Raises:
        ValueError: it cannot be imported; the message names `argument`.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{argument} {name!r} must be a function that can be imported: {error}.") from error
