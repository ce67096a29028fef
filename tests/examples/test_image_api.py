"""The HTTP interface of the image server with a model that takes no time; no Ray is started."""

import asyncio
import base64
import json
from collections import Counter

import pytest


pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")
from starlette.requests import Request

from examples import image_api
from examples.image_api import Abilities, Generated, ImageApi


OPENAI = "/v1/images/generations"


class Model:
    """Answers with the job itself in place of an image, when `gate` is open."""

    def __init__(self, **abilities):
        self.can = Abilities(**({"sizes": ((64, 64), (32, 96))} | abilities))
        self.jobs = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def abilities(self):
        return self.can

    async def generate(self, job):
        self.jobs.append(job)
        await self.gate.wait()
        return Generated(None, "cannot generate this") if job.prompt == "bad" else Generated(repr(job).encode())


async def ask(api, path, body=b"", method="POST"):
    """Status, headers and body of the answer to a request."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
    answer = await api(Request(scope, receive))
    return answer.status_code, answer.headers, answer.body


def server(replicas=None, **options):
    models = {"plain": Model(), "fast": Model(takes_negative_prompt=False)}

    async def running():
        return dict.fromkeys(models, 1) if replicas is None else replicas

    return ImageApi(models, running, **options), models


def test_images_as_openai_has_them():
    async def run():
        api, models = server()
        body = {"prompt": "a fox", "n": 2, "size": "96x32", "seed": 7, "user": "me", "model": None}
        status, headers, answer = await ask(api, OPENAI, body)
        assert (status, headers["content-type"]) == (200, "application/json")
        answer = json.loads(answer)
        assert answer["size"] == "96x32"
        assert [image["seed"] for image in answer["data"]] == [7, 8]
        files = [base64.b64decode(image["b64_json"]).decode() for image in answer["data"]]
        assert files == [f"Job(prompt='a fox', negative_prompt='', seed={s}, height=32, width=96)" for s in (7, 8)]

        body = {"prompt": "a fox", "model": "fast", "response_format": "url"}
        images = [json.loads((await ask(api, OPENAI, body))[2])["data"][0] for _ in range(2)]
        for image, job in zip(images, models["fast"].jobs, strict=True):
            assert image["url"] == "data:image/png;base64," + base64.b64encode(repr(job).encode()).decode()
            assert (job.seed, job.height, job.width) == (image["seed"], 64, 64)
        assert images[0]["seed"] != images[1]["seed"]  # random ones, but for once in 2^32 times

    asyncio.run(run())


def test_native_call():
    async def run():
        api, models = server()
        status, headers, png = await ask(api, "/", {"prompt": "a fox", "negative_prompt": "dark"})
        assert (status, headers["content-type"]) == (200, "image/png")
        assert png == repr(models["plain"].jobs[0]).encode()
        assert models["plain"].jobs == [image_api.Job("a fox", "dark", 0, 64, 64)]

    asyncio.run(run())


REFUSED = [
    # body, status, code, field, part of the message
    (b"{", 400, "invalid_json", None, "the body must be JSON"),
    (b"\xff", 400, "invalid_json", None, "the body must be JSON"),
    (b"[" * 60000, 400, "invalid_json", None, "nested too deeply"),
    (b"[]", 400, "invalid_json", None, "must be a JSON object, got list"),
    (b" " * 70000, 413, "body_too_large", None, "at most 65536 bytes"),
    ({}, 400, "missing_required_parameter", "prompt", "`prompt` must be given"),
    ({"prompt": None}, 400, "missing_required_parameter", "prompt", "`prompt` must be given"),
    ({"prompt": 3}, 400, "invalid_type", "prompt", "must be of type str, got int"),
    ({"prompt": ["a"]}, 400, "invalid_type", "prompt", "must be of type str, got list"),
    ({"prompt": "a" * 5000}, 400, "invalid_value", "prompt", "at most 4000 characters, got 5000"),
    (b'{"prompt": "a\\ud800"}', 400, "invalid_value", "prompt", "must be Unicode text"),
    (b'{"prompt": "a", "negative_prompt": "\\udfff"}', 400, "invalid_value", "negative_prompt", "must be Unicode"),
    ({"prompt": "a", "model": "fast", "negative_prompt": "b"}, 400, "invalid_value", "negative_prompt", "left out"),
    ({"prompt": "a", "model": "dall-e-3"}, 404, "model_not_found", "model", "must be one of plain, fast, got 'dall"),
    ({"prompt": "a", "n": 0}, 400, "invalid_value", "n", "must be from 1 to 10, got 0"),
    ({"prompt": "a", "n": 11}, 400, "invalid_value", "n", "must be from 1 to 10, got 11"),
    ({"prompt": "a", "n": True}, 400, "invalid_type", "n", "must be of type int, got bool"),
    ({"prompt": "a", "n": 1.0}, 400, "invalid_type", "n", "must be of type int, got float"),
    ({"prompt": "a", "size": "1024x1024"}, 400, "invalid_value", "size", "must be auto or one of 64x64, 96x32"),
    ({"prompt": "a", "size": "32x96"}, 400, "invalid_value", "size", "width first"),
    ({"prompt": "a", "seed": -1}, 400, "invalid_value", "seed", "must be from 0 to 2^63 - 1"),
    ({"prompt": "a", "seed": 2**63}, 400, "invalid_value", "seed", "must be from 0 to 2^63 - 1"),
    ({"prompt": "a", "seed": 2**63 - 1, "n": 2}, 400, "invalid_value", "seed", "must be from 0 to 2^63 - 2"),
    ({"prompt": "a", "seed": "1"}, 400, "invalid_type", "seed", "must be of type int, got str"),
    ({"prompt": "a", "response_format": "png"}, 400, "invalid_value", "response_format", "b64_json or url"),
    ({"prompt": "a", "quality": "hd"}, 400, "unknown_parameter", "quality", "`quality` is unknown; this call takes"),
    ({"prompt": "bad"}, 500, "generation_failed", None, "cannot generate this"),
]


@pytest.mark.parametrize(("body", "status", "code", "param", "message"), REFUSED)
def test_what_is_refused(body, status, code, param, message):
    async def run():
        api, models = server()
        answered, headers, error = await ask(api, OPENAI, body)
        error = json.loads(error)["error"]
        assert (answered, error["code"], error["param"]) == (status, code, param)
        assert message in error["message"]
        assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
        assert headers["content-type"] == "application/json"
        assert models["plain"].jobs == [] or status == 500  # refused before it waits
        assert (await ask(api, OPENAI, {"prompt": "a"}))[0] == 200

    asyncio.run(run())


def test_paths_and_methods():
    async def run():
        api, _ = server()
        assert (await ask(api, "/v1/chat/completions"))[0] == 404
        assert (await ask(api, OPENAI, method="GET"))[0] == 405
        assert (await ask(api, "/", {"prompt": "a", "n": 2}))[0] == 400  # one PNG is the answer
        status, _, models = await ask(api, "/v1/models", method="GET")
        assert (status, [model["id"] for model in json.loads(models)["data"]]) == (200, ["plain", "fast"])

    asyncio.run(run())


def test_what_waits_is_limited_and_nothing_accepted_is_lost():
    async def run():
        api, models = server(max_pending=5)
        models["plain"].gate.clear()
        asked = [asyncio.create_task(ask(api, OPENAI, {"prompt": "a", "n": 2})) for _ in range(4)]
        asked += [asyncio.create_task(ask(api, OPENAI, {"prompt": "a"})) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert len(models["plain"].jobs) == 5  # 2 + 2 + 1
        assert (await ask(api, OPENAI, {"prompt": "a", "model": "fast"}))[0] == 200  # each model has its own limit
        metrics = (await ask(api, "/metrics", method="GET"))[2].decode()
        assert 'diffusers_sana_pending_images{model="plain"} 5.0' in metrics
        models["plain"].gate.set()
        answers = await asyncio.gather(*asked)
        assert Counter(status for status, *_ in answers) == {200: 3, 503: 4}
        for status, headers, body in answers:
            if status == 503:
                assert headers["retry-after"] == "1"
                assert json.loads(body)["error"]["code"] == "overloaded"
        assert api.pending == {"plain": 0, "fast": 0}
        assert (await ask(api, OPENAI, {"prompt": "a", "n": 5}))[0] == 200

    asyncio.run(run())


def test_draining_answers_what_was_accepted():
    async def run():
        api, models = server()
        models["plain"].gate.clear()
        accepted = asyncio.create_task(ask(api, "/", {"prompt": "a"}))
        await asyncio.sleep(0.01)
        assert await api.drain(0.05) == 1
        draining = asyncio.create_task(api.drain(60))
        await asyncio.sleep(0.01)
        status, _, body = await ask(api, "/", {"prompt": "late"})
        assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")
        assert (await ask(api, "/health", method="GET"))[0] == 503
        assert not draining.done()
        models["plain"].gate.set()
        assert (await accepted)[0] == 200
        assert await draining == 0

    asyncio.run(run())


def test_a_request_that_takes_too_long_is_given_up():
    async def run():
        api, models = server(timeout=0.05)
        models["plain"].gate.clear()
        status, _, body = await ask(api, "/", {"prompt": "a"})
        assert (status, json.loads(body)["error"]["code"]) == (504, "timeout")
        assert api.pending["plain"] == 0

    asyncio.run(run())


@pytest.mark.parametrize(("replicas", "status"), [({"plain": 2, "fast": 1}, 200), ({"plain": 2, "fast": 0}, 503)])
def test_health(replicas, status):
    async def run():
        api, _ = server(replicas)
        answered, _, body = await ask(api, "/health", method="GET")
        assert (answered, json.loads(body)["replicas"]) == (status, replicas)

    asyncio.run(run())


def test_metrics():
    async def run():
        api, _ = server()
        await ask(api, OPENAI, {"prompt": "a", "n": 3})
        await ask(api, "/", {"prompt": "bad"})
        await ask(api, "/", {"prompt": 1})
        await ask(api, "/made-up-1")
        await ask(api, "/made-up-2")
        status, headers, text = await ask(api, "/metrics", method="GET")
        assert status == 200
        assert headers["content-type"].startswith("text/plain")
        lines = text.decode().split("\n")
        for line in (
            'diffusers_sana_requests_total{path="/v1/images/generations",status="200"} 1.0',
            'diffusers_sana_requests_total{path="/",status="500"} 1.0',
            'diffusers_sana_requests_total{path="/",status="400"} 1.0',
            'diffusers_sana_requests_total{path="other",status="404"} 2.0',
            'diffusers_sana_images_total{model="plain"} 3.0',
            'diffusers_sana_failures_total{model="plain"} 1.0',
            'diffusers_sana_batch_size_bucket{le="1.0",model="plain"} 3.0',
            'diffusers_sana_request_seconds_count{path="/"} 2.0',
        ):
            assert line in lines

    asyncio.run(run())


def test_an_error_of_the_server_is_not_told():
    async def run():
        api, models = server()

        async def generate(_job):
            raise RuntimeError("/home/me/secret")

        models["plain"].generate = generate
        status, _, body = await ask(api, "/", {"prompt": "a"})
        assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
        assert b"secret" not in body
        assert api.pending["plain"] == 0

    asyncio.run(run())
