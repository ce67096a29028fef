"""DPG-Bench (ELLA, arXiv 2403.05135): dense prompts, with yes-or-no questions about what their images must show.

Nothing here imports torch.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_sana.files import read_text


COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass(frozen=True)
class Question:
    """A question about the image of a prompt. The right answer is "yes".

    Attributes:
        number: its number among the questions of its prompt.
        text: what is asked.
        category: such as "attribute - color"; what is before the dash is the broad category.
        parents: numbers of the questions that must also be answered with "yes": the color of an object depends on the
            object.
    """

    number: int
    text: str
    category: str
    parents: tuple[int, ...] = ()


@dataclass(frozen=True)
class Questioned:
    """A prompt and its questions.

    Attributes:
        name: of the prompt in the benchmark.
        prompt: text.
        questions: in the order of the file.
    """

    name: str
    prompt: str
    questions: tuple[Question, ...]


def read_questions(path: Path) -> list[Questioned]:
    """The prompts and questions of `dpg_bench.csv`, or of a file with its columns `COLUMNS`.

    Raises:
        OSError: there is no such file.
        ValueError: it lacks a column or a row, or a row is not one of the benchmark; the message names it.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if missing := set(COLUMNS) - set(reader.fieldnames or ()):
        raise ValueError(f"{path} must have the columns of dpg_bench.csv, but lacks {sorted(missing)}")
    texts: dict[str, str] = {}
    questions: dict[str, dict[int, Question]] = {}
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        try:
            question = _read_question(row)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: must be a row of DPG-Bench: {error!r}") from error
        name = row["item_id"]
        texts[name] = texts.get(name) or row["text"]
        if questions.setdefault(name, {}).setdefault(question.number, question) is not question:
            raise ValueError(f"{where}: `proposition_id` {question.number} of {name!r} is there twice; remove one")
    if not texts:
        raise ValueError(f"{path} must have at least one question; it has none")
    for name, asked in questions.items():
        if not texts[name]:
            raise ValueError(f"{path}: `text` of {name!r} must be a prompt; it is empty")
        if unknown := {parent for question in asked.values() for parent in question.parents} - asked.keys():
            raise ValueError(f"{path}: `dependency` of {name!r} must name its questions; there is no {unknown}")
    return [Questioned(name, texts[name], tuple(asked.values())) for name, asked in questions.items()]


def _read_question(row: Mapping[str, Any]) -> Question:
    parents = tuple(int(each) for each in row["dependency"].split(","))
    category = row["tuple"].partition("(")[0].strip()
    text = row["question_natural_language"]
    if not text or not category:
        raise ValueError("`tuple` and `question_natural_language` must not be empty")
    return Question(int(row["proposition_id"]), text, category, tuple(each for each in parents if each))


def credited(questions: Sequence[Question], answers: Mapping[int, bool]) -> dict[int, bool]:
    """The questions that count as right: those of "yes" whose parents all count as right.

    This goes in the order of the file, as in the authors' program: for a parent that comes later, its answer counts.
    """
    counted = dict(answers)
    for question in questions:
        counted[question.number] = answers[question.number] and all(counted[parent] for parent in question.parents)
    return counted
