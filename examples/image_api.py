"""The HTTP interface of an image server, in the style of OpenAI's: what `ray_serve.py` answers, without Ray.

| call | answer |
|---|---|
| `POST /v1/images/generations` | JSON with `n` images in base64, as OpenAI's |
| `POST /` | one PNG |
| `GET /v1/models` | the models |
| `GET /health` | 200 if each model has a replica that runs, else 503 |
| `GET /metrics` | Prometheus' text format |

Requests are checked before they wait, one by one, so whatever waits can be part of a batch. Every error is
`{"error": {"message", "type", "param", "code"}}`, as in OpenAI's API, whose clients try 503 again by themselves.
"""

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response


logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 2**16
MAX_PROMPT_CHARACTERS = 4000  # the text encoder reads 300 tokens
MAX_IMAGES = 10  # of one request
LARGEST_SEED = 2**63 - 1
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)  # bounds of the histograms
BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Job:
    """One image to generate, which is what a replica is sent.

    Attributes:
        prompt, negative_prompt: what it shows and what it avoids.
        seed: of its noise.
        height, width: in pixels.
    """

    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int


@dataclass(frozen=True)
class Generated:
    """What became of a job.

    Attributes:
        png: the file, or None if the pipeline failed.
        error: why it failed.
        batch: images that were computed with it.
        seconds: that this took.
        retries: replicas that died with it before.
    """

    png: bytes | None
    error: str = ""
    batch: int = 1
    seconds: float = 0.0
    retries: int = 0


@dataclass(frozen=True)
class Abilities:
    """What a model can be asked for.

    Attributes:
        sizes: heights and widths in pixels, the default first.
        takes_negative_prompt: SANA-Sprint does not.
    """

    sizes: tuple[tuple[int, int], ...]
    takes_negative_prompt: bool = True


class Backend(Protocol):
    """What generates the images of a model: one or more replicas."""

    async def abilities(self) -> Abilities:
        """What requests may ask for."""
        ...

    async def generate(self, job: Job) -> Generated:
        """The image, when it is done. Raises if there are no replicas to do it."""
        ...


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        param: the field that is wrong.
        code: the kind of error, for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> Response:
        """The answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": "1"} if self.status == 503 else None
        return JSONResponse({"error": error}, self.status, headers)


@dataclass(frozen=True)
class ImageRequest:
    """The body of a request. A field that is null is as if it were left out.

    Attributes:
        prompt: what to generate.
        model: one of the server's; default: the first.
        negative_prompt: what to avoid; not in OpenAI's API.
        n: images, with the seeds `seed`, `seed` + 1 and so on.
        size: "256x256", width first, or "auto", the model's own.
        seed: of the first image; None for a random one, which the answer states; not in OpenAI's API.
        response_format: "b64_json", or "url" for a `data:` address with the image in it: the server keeps no files.
        user: whom the image is for; not used.

    Raises:
        RequestError: a field is of another type, or its value is out of range.
    """

    prompt: str
    model: str | None = None
    negative_prompt: str = ""
    n: int = 1
    size: str = "auto"
    seed: int | None = None
    response_format: str = "b64_json"
    user: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, wanted = getattr(self, field.name), int if field.name in ("n", "seed") else str
            if type(value) is not wanted and not (value is None and field.default is None):
                raise RequestError(
                    400,
                    f"`{field.name}` must be of type {wanted.__name__}, got {type(value).__name__}",
                    field.name,
                    "invalid_type",
                )
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if len(text) > MAX_PROMPT_CHARACTERS:
                self._refuse(name, f"must have at most {MAX_PROMPT_CHARACTERS} characters, got {len(text)}")
            if any("\ud800" <= character <= "\udfff" for character in text):
                self._refuse(name, "must be Unicode text, got a lone surrogate")
        if not 1 <= self.n <= MAX_IMAGES:
            self._refuse("n", f"must be from 1 to {MAX_IMAGES}, got {self.n}")
        if self.seed is not None and not 0 <= self.seed <= LARGEST_SEED - self.n + 1:
            self._refuse("seed", f"must be from 0 to 2^63 - {self.n}, got {self.seed}")
        if self.response_format not in ("b64_json", "url"):
            self._refuse("response_format", f"must be b64_json or url, got {self.response_format!r}")

    @classmethod
    def from_json(cls, body: bytes, names: tuple[str, ...]) -> "ImageRequest":
        """The request that a body is.

        Args:
            body: JSON.
            names: fields that the call takes.

        Raises:
            RequestError: it is none.
        """
        try:
            values = json.loads(body)
        except RecursionError:
            raise RequestError(400, "the JSON is nested too deeply", code="invalid_json") from None
        except ValueError as error:
            raise RequestError(400, f"the body must be JSON: {error}", code="invalid_json") from None
        if not isinstance(values, dict):
            kind = type(values).__name__
            raise RequestError(400, f"the body must be a JSON object, got {kind}", code="invalid_json")
        if unknown := sorted(values.keys() - set(names)):
            message = f"`{unknown[0]}` is unknown; this call takes {', '.join(names)}"
            raise RequestError(400, message, unknown[0], "unknown_parameter")
        values = {name: value for name, value in values.items() if value is not None}
        if "prompt" not in values:
            raise RequestError(400, "`prompt` must be given", "prompt", "missing_required_parameter")
        return cls(**values)

    def jobs(self, abilities: Abilities) -> list[Job]:
        """One for each image.

        Args:
            abilities: of the model.

        Raises:
            RequestError: the model cannot do it.
        """
        sizes = {f"{width}x{height}": (height, width) for height, width in abilities.sizes}
        if self.size not in ("auto", *sizes):
            self._refuse("size", f"must be auto or one of {', '.join(sizes)}, width first, got {self.size!r}")
        if self.negative_prompt and not abilities.takes_negative_prompt:
            self._refuse("negative_prompt", "must be left out for this model, which has no guidance")
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        height, width = sizes.get(self.size, abilities.sizes[0])
        return [Job(self.prompt, self.negative_prompt, seed + i, height, width) for i in range(self.n)]

    def _refuse(self, name: str, reason: str) -> None:
        raise RequestError(400, f"`{name}` {reason}", name, "invalid_value")


OPENAI_FIELDS = tuple(field.name for field in fields(ImageRequest))
NATIVE_FIELDS = ("prompt", "model", "negative_prompt", "size", "seed")


class Metrics:
    """Counts and times of a server, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix, kinds = "diffusers_sana_", {"registry": self.registry}
        self.requests = Counter(f"{prefix}requests", "Requests answered.", ["path", "status"], **kinds)
        self.seconds = Histogram(
            f"{prefix}request_seconds", "From request to answer.", ["path"], buckets=SECONDS, **kinds
        )
        self.images = Counter(f"{prefix}images", "Images generated.", ["model"], **kinds)
        self.failures = Counter(f"{prefix}failures", "Images that failed.", ["model"], **kinds)
        self.retries = Counter(f"{prefix}retries", "Replicas that died with an image.", ["model"], **kinds)
        self.pending = Gauge(f"{prefix}pending_images", "Images that wait or are generated.", ["model"], **kinds)
        self.batches = Histogram(
            f"{prefix}batch_size", "Images per batch, counted for each image.", ["model"], buckets=BATCHES, **kinds
        )
        self.batch_seconds = Histogram(
            f"{prefix}batch_seconds", "Of a batch, counted for each image.", ["model"], buckets=SECONDS, **kinds
        )

    def count(self, model: str, image: Generated) -> None:
        """Counts what became of a job."""
        self.retries.labels(model).inc(image.retries)
        if image.png is None:
            self.failures.labels(model).inc()
            return
        self.images.labels(model).inc()
        self.batches.labels(model).observe(image.batch)
        self.batch_seconds.labels(model).observe(image.seconds)


class ImageApi:
    """Answers requests.

    Args:
        backends: by the names of their models; the first is the default.
        replicas: how many replicas of each model run.
        max_pending: images of a model that wait or are generated, at most; further requests get a 503.
        timeout: seconds after which a request gets a 504.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        replicas: Callable[[], Awaitable[Mapping[str, int]]],
        max_pending: int = 100,
        timeout: float = 600,
    ) -> None:
        self.backends, self.replicas = dict(backends), replicas
        self.max_pending, self.timeout = max_pending, timeout
        self.pending = dict.fromkeys(backends, 0)
        self.abilities: dict[str, Abilities] = {}
        self.metrics = Metrics()
        self.started = int(time.time())
        self.is_draining = False
        self.routes: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
            "/": ("POST", self.native),
            "/v1/images/generations": ("POST", self.generations),
            "/v1/models": ("GET", self.models),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.scrape),
        }

    async def __call__(self, request: Request) -> Response:
        """The answer to any request."""
        started, path = time.perf_counter(), request.url.path
        try:
            if path not in self.routes:
                raise RequestError(
                    404, f"there is no {path} here; there are {', '.join(self.routes)}", code="not_found"
                )
            method, answer = self.routes[path]
            if request.method != method:
                raise RequestError(405, f"{path} takes {method}, got {request.method}", code="method_not_allowed")
            response = await answer(request)
        except RequestError as error:
            response = error.response()
        except Exception:  # of this server, so the client is not told
            logger.exception("a request failed")
            response = RequestError(500, "the server failed; its log says why", code="internal_error").response()
        label = path if path in self.routes else "other"  # clients cannot make up labels without end
        self.metrics.requests.labels(label, str(response.status_code)).inc()
        self.metrics.seconds.labels(label).observe(time.perf_counter() - started)
        return response

    async def native(self, request: Request) -> Response:
        """One image as a PNG; without `seed` it is of seed 0."""
        wanted = ImageRequest.from_json(await _read_body(request), NATIVE_FIELDS)
        _, images = await self._generate(replace(wanted, seed=wanted.seed or 0))
        return Response(images[0], media_type="image/png")

    async def generations(self, request: Request) -> Response:
        """The images as OpenAI's API has them."""
        wanted = ImageRequest.from_json(await _read_body(request), OPENAI_FIELDS)
        jobs, images = await self._generate(wanted)
        data = []
        for job, png in zip(jobs, images, strict=True):
            text = base64.b64encode(png).decode()
            value = f"data:image/png;base64,{text}" if wanted.response_format == "url" else text
            data.append({wanted.response_format: value, "seed": job.seed})
        first = jobs[0]
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": data,
                "output_format": "png",
                "size": f"{first.width}x{first.height}",
            }
        )

    async def models(self, _request: Request) -> Response:
        """The models, as OpenAI's API has them."""
        data = [
            {"id": name, "object": "model", "created": self.started, "owned_by": "diffusers_sana"}
            for name in self.backends
        ]
        return JSONResponse({"object": "list", "data": data})

    async def health(self, _request: Request) -> Response:
        """Whether every model can be asked."""
        replicas = dict(await self.replicas())
        is_ready = not self.is_draining and all(replicas.get(name, 0) for name in self.backends)
        status = "ok" if is_ready else "shutting down" if self.is_draining else "a model has no replica"
        return JSONResponse({"status": status, "replicas": replicas}, 200 if is_ready else 503)

    async def scrape(self, _request: Request) -> Response:
        """The metrics."""
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def drain(self, timeout: float) -> int:
        """Refuses new requests and waits for those that were accepted.

        Args:
            timeout: seconds to wait, at most.

        Returns:
            Images that are still not finished.
        """
        self.is_draining = True
        deadline = time.monotonic() + timeout
        while sum(self.pending.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return sum(self.pending.values())

    async def _generate(self, wanted: ImageRequest) -> tuple[list[Job], list[bytes]]:
        """The jobs of a request and their files."""
        model = next(iter(self.backends)) if wanted.model is None else wanted.model
        if model not in self.backends:
            message = f"`model` must be one of {', '.join(self.backends)}, got {model!r}"
            raise RequestError(404, message, "model", "model_not_found")
        if model not in self.abilities:
            self.abilities[model] = await self.backends[model].abilities()
        jobs = wanted.jobs(self.abilities[model])
        if self.is_draining:
            raise RequestError(503, "the server is shutting down; try again", code="shutting_down")
        # From here on the request is accepted: nothing but its own failure, or the timeout, ends it without images.
        if self.pending[model] + len(jobs) > self.max_pending:
            message = f"{self.pending[model]} images wait, of at most {self.max_pending}; try again later"
            raise RequestError(503, message, code="overloaded")
        self._add_pending(model, len(jobs))
        try:
            generating = asyncio.gather(*(self.backends[model].generate(job) for job in jobs))
            images = await asyncio.wait_for(generating, self.timeout)
        except TimeoutError:
            message = f"the images were not done after {self.timeout:g} s; try again later"
            raise RequestError(504, message, code="timeout") from None
        finally:
            self._add_pending(model, -len(jobs))
        for image in images:
            self.metrics.count(model, image)
        if errors := [image.error for image in images if image.png is None]:
            raise RequestError(500, f"the image could not be generated: {errors[0]}", code="generation_failed")
        return jobs, [image.png for image in images if image.png is not None]

    def _add_pending(self, model: str, count: int) -> None:
        self.pending[model] += count
        self.metrics.pending.labels(model).set(self.pending[model])


async def _read_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(413, f"the body must have at most {MAX_BODY_BYTES} bytes", code="body_too_large")
    return body
