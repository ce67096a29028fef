"""The examples for Ray, each in a Ray of its own with two CPUs."""

import concurrent.futures
import io
import json
import os
import socket
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffusers_sana import SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI
from examples.generate_many import generate, read_tasks
from tests.two_processes import ROOT


ray = pytest.importorskip("ray")
STEPS = 2


@pytest.fixture(autouse=True)
def local_ray(monkeypatch):
    # Ray asks nobody for anything, and its processes find the examples.
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    except Exception as error:  # Ray raises no other class
        if "timed out during startup" not in str(error):
            raise
        pytest.skip("this machine is too busy to start Ray in its 30 s")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pipe():
    pipe = SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(image, other):
    """The largest, in steps of a byte."""
    first, second = (
        torch.frombuffer(bytearray(x.convert("RGB").tobytes()), dtype=torch.uint8) for x in (image, other)
    )
    return (first.int() - second.int()).abs().max()


def test_data(tmp_path, pipe):
    from examples.ray_data import generate_all

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na fox\n")
    tasks = read_tasks(prompts, tmp_path, seed=5)
    generated = generate_all(tasks, batch_size=2, num_inference_steps=STEPS)
    assert sorted(generated) == [str(task.path) for task in tasks]
    expected = [
        *generate(pipe, tasks[:2], num_inference_steps=STEPS),
        *generate(pipe, tasks[2:], num_inference_steps=STEPS),
    ]
    for task, image in zip(tasks, expected, strict=True):
        assert task.is_done()
        assert difference(Image.open(task.path), image) == 0
    assert generate_all(tasks, batch_size=2, num_inference_steps=STEPS) == []


def test_serve(pipe):
    from ray import serve

    from examples.ray_serve import application

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"

    def post(body):
        with urllib.request.urlopen(address, data=body, timeout=120) as answer:
            assert answer.headers["content-type"] == "image/png"
            return Image.open(io.BytesIO(answer.read()))

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(wait=1.0, num_inference_steps=STEPS))
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            images = list(pool.map(post, (b'{"prompt": "a cat", "seed": %d}' % seed for seed in (1, 2))))
        for seed, image in zip((1, 2), images, strict=True):
            generator = torch.Generator().manual_seed(seed)
            expected = pipe("a cat", num_inference_steps=STEPS, generator=generator).images[0]
            assert difference(image, expected) <= 2
        # Bad requests are refused by themselves; the good one that arrives with them gets its image.
        bad = {
            b'{"seed": 1}': (400, "prompt"),
            b'{"prompt": 3}': (400, "`prompt` must be of type str, got int"),
            b"{": (400, "Expect"),
            b'{"prompt": "a", "seed": 1180591620717411303424}': (400, "`seed` must be from 0"),
            b'{"prompt": "a\\ud800"}': (400, "`prompt` must be Unicode text"),
            b'{"prompt": "a", "negative_prompt": "\\udfff"}': (400, "`negative_prompt` must be Unicode text"),
            b"[" * 60000: (400, "nested too deeply"),
            json.dumps({"prompt": "a" * 5000}).encode(): (400, "at most 4000 characters, got 5000"),
            b" " * 70000: (413, "at most 65536 bytes"),
        }
        with concurrent.futures.ThreadPoolExecutor(max_workers=len(bad) + 1) as pool:
            good = pool.submit(post, b'{"prompt": "a cat", "seed": 1}')
            refused = {body: pool.submit(post, body) for body in bad}
            assert difference(good.result(), images[0]) <= 2
        for body, (code, message) in bad.items():
            error = refused[body].exception()
            assert isinstance(error, urllib.error.HTTPError)
            assert (error.code, message in error.read().decode()) == (code, True), body[:40]
    finally:
        serve.shutdown()


def test_a_request_that_fails_in_the_pipeline_fails_alone():
    """What the checks let through may still fail: here a pipeline that cannot stand one prompt."""
    from examples.ray_serve import ImageGenerator, ImageRequest

    class Pipe:
        def __call__(self, prompts, **options):
            if "bad" in prompts:
                raise ValueError("cannot generate this")
            return SimpleNamespace(images=[Image.new("RGB", (8, 8)) for _ in prompts])

    generator = object.__new__(ImageGenerator)
    generator.pipe, generator.options = Pipe(), {}
    answers = generator._generate([ImageRequest(prompt) for prompt in ("a cat", "bad", "a dog")])
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert b"cannot generate this" in answers[1].body
    assert Image.open(io.BytesIO(answers[2].body)).size == (8, 8)
