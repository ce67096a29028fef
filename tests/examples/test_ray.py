"""The examples for Ray, each in a Ray of its own with two CPUs."""

import base64
import concurrent.futures
import io
import json
import os
import socket
import time
import urllib.error
import urllib.request

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
    """Batches, both precisions, refusals beside good requests, and a replica that is killed with requests."""
    from ray import serve

    from examples.ray_serve import NAME, application

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"

    def call(path, body=None):
        with urllib.request.urlopen(address + path, data=body, timeout=300) as answer:
            return answer.headers["content-type"], answer.read()

    def post(body):
        kind, png = call("/", body)
        assert kind == "image/png"
        return Image.open(io.BytesIO(png))

    def post_openai(body):
        return [
            (image["seed"], Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))
            for image in json.loads(call("/v1/images/generations", body)[1])["data"]
        ]

    def metrics():
        lines = call("/metrics")[1].decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def expected(seed):
        return pipe("a cat", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed)).images[0]

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(wait=1.0, replicas_4bit=1, num_inference_steps=STEPS), name=NAME)
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            images = list(pool.map(post, (b'{"prompt": "a cat", "seed": %d}' % seed for seed in (1, 2))))
        for seed, image in zip((1, 2), images, strict=True):
            assert difference(image, expected(seed)) <= 2
        assert metrics()['diffusers_sana_batch_size_sum{model="sana-emoji"}'] == 4  # 2 images in a batch of 2
        # The same seeds from the other call, and in 4 bits.
        body = b'{"prompt": "a cat", "seed": 1, "n": 2, "size": "256x256"%s}'
        again = post_openai(body % b"")
        assert [seed for seed, _ in again] == [1, 2]
        assert all(difference(image, before) <= 2 for (_, image), before in zip(again, images, strict=True))
        small = post_openai(body % b', "model": "sana-emoji-4bit"')
        assert all(difference(image, before) > 2 for (_, image), before in zip(small, images, strict=True))
        pixels = [torch.tensor(list(image.tobytes())).float() for image in (small[0][1], images[0], images[1])]
        assert (pixels[0] - pixels[1]).abs().mean() < (pixels[0] - pixels[2]).abs().mean() / 2
        assert json.loads(call("/health")[1]) == {"status": "ok", "replicas": {"sana-emoji": 1, "sana-emoji-4bit": 1}}

        # A bad request is refused by itself; the good one that arrives with it gets its image.
        bad = {
            b'{"prompt": 3}': (400, "`prompt` must be of type str, got int"),
            b'{"prompt": "a", "seed": 1180591620717411303424}': (400, "`seed` must be from 0"),
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

        # The only replica is killed while it waits for more images of a batch: the next one generates what it had.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for _ in range(20):  # on a busy machine the images may be done before the metrics are asked for
                accepted = [pool.submit(post, b'{"prompt": "a cat", "seed": %d}' % seed) for seed in (1, 2)]
                while not (waiting := metrics()['diffusers_sana_pending_images{model="sana-emoji"}'] == 2):
                    if any(future.done() for future in accepted):
                        break
                    time.sleep(0.02)
                if waiting:
                    break
                concurrent.futures.wait(accepted)
            else:
                pytest.skip("this machine is too busy to see requests wait")
            time.sleep(0.2)
            (name,) = [
                actor["name"]
                for actor in ray.util.list_named_actors(all_namespaces=True)
                if actor["name"].startswith("SERVE_REPLICA") and "#sana-emoji#" in actor["name"]
            ]
            ray.kill(ray.get_actor(name, namespace="serve"))
            for future, image in zip(accepted, images, strict=True):
                assert difference(future.result(), image) <= 2
        assert metrics()['diffusers_sana_retries_total{model="sana-emoji"}'] == 2
    finally:
        serve.shutdown()
