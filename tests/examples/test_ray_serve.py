"""The parts of `ray_serve.py` that need no running Ray."""

import asyncio
import io
import sys
from types import SimpleNamespace

import pytest
from PIL import Image


pytest.importorskip("ray")
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from examples import ray_serve
from examples.image_api import Generated, Job
from examples.ray_serve import ATTEMPTS, ImageGenerator, Replicas


class Pipe:
    """Images of the size asked for; cannot stand one prompt."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, height, width, **options):
        self.calls.append((prompts, height, width, options))
        if "bad" in prompts:
            raise ValueError("cannot generate this")
        return SimpleNamespace(images=[Image.new("RGB", (width, height)) for _ in prompts])


def job(prompt, size=(8, 8), negative_prompt=""):
    return Job(prompt, negative_prompt, 0, *size)


@pytest.fixture
def generator():
    generator = object.__new__(ImageGenerator)
    generator.pipe, generator.options = Pipe(), {"num_inference_steps": 2}
    return generator


def test_an_image_that_fails_in_the_pipeline_fails_alone(generator):
    """What the checks let through may still fail: here a pipeline that cannot stand one prompt."""
    results = generator._generate([job(prompt) for prompt in ("a cat", "bad", "a dog")])
    assert [result.png is None for result in results] == [False, True, False]
    assert "cannot generate this" in results[1].error
    assert Image.open(io.BytesIO(results[2].png)).size == (8, 8)


def test_a_batch_has_one_size(generator):
    jobs = [job("a", (8, 8)), job("b", (8, 16)), job("c", (8, 8)), job("d", (16, 8))]
    results = generator._generate(jobs)
    assert [Image.open(io.BytesIO(result.png)).size for result in results] == [(8, 8), (16, 8), (8, 8), (8, 16)]
    assert [result.batch for result in results] == [2, 1, 2, 1]
    assert sorted(call[0] for call in generator.pipe.calls) == [["a", "c"], ["b"], ["d"]]


def test_negative_prompts_are_passed_only_where_there_are_some(generator):
    generator._generate([job("a")])  # SANA-Sprint has no such argument
    generator._generate([job("a"), job("b", negative_prompt="dark")])
    options = [call[3] for call in generator.pipe.calls]
    assert "negative_prompt" not in options[0]
    assert options[1]["negative_prompt"] == ["", "dark"]
    assert all(option["num_inference_steps"] == 2 for option in options)


class Handle:
    """Answers as Ray's handle of a deployment does: raises what it is given, then succeeds."""

    def __init__(self, *errors):
        self.errors, self.generate = list(errors), self

    async def remote(self, job):
        if self.errors:
            raise self.errors.pop(0)
        return Generated(job.prompt.encode())


def test_another_replica_generates_what_a_dead_one_had():
    handle = Handle(ActorDiedError(), ActorUnavailableError("gone", None))
    assert asyncio.run(Replicas(handle).generate(job("a"))) == Generated(b"a", retries=2)


def test_an_image_that_kills_replicas_is_given_up():
    handle = Handle(*[ActorDiedError()] * ATTEMPTS)
    result = asyncio.run(Replicas(handle).generate(job("a")))
    assert (result.png, result.retries) == (None, ATTEMPTS)
    assert "4 replicas died" in result.error


def test_errors_of_a_living_replica_are_not_tried_again():
    handle = Handle(RayTaskError("f", "", ValueError("wrong")))
    with pytest.raises(RayTaskError):
        asyncio.run(Replicas(handle).generate(job("a")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "0"], "--replicas or --replicas-4bit must be at least 1"),
        (["--port", "99999"], "argument --port: must be at most 65535"),
        (["--model", "vila-u-emoji"], "--model must be a Sana or a SANA-Sprint"),
        (["--model-4bit", "./no-such-folder"], "there is no folder ./no-such-folder"),
    ],
)
def test_wrong_arguments_end_it_before_ray_starts(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ray_serve.py", *arguments])
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        ray_serve.main()
    assert message in f"{error.value}{capsys.readouterr().err}"
