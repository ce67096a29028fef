"""Serve images over HTTP with Ray Serve; requests that arrive together are generated as one batch.

    python -m examples.ray_serve --replicas 1 --gpus-per-replica 1
    curl -d '{"prompt": "a red apple on a blue background", "seed": 1}' localhost:8000 -o apple.png

A request is a JSON object with `prompt` and optionally `negative_prompt` and `seed`. The answer is a PNG; 400 with the
reason for a bad request; 413 for a body above 64 KiB; 503 while the queue is full. A request that fails inside the
pipeline gets a 500, and the others of its batch get their images. Equal requests give equal images up to rounding,
which depends on the other images of the batch.
"""

import asyncio
import io
import json
import logging
from dataclasses import dataclass, fields
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from diffusers_sana.arguments import ArgumentParser, integer, number, run_script
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.loading import pipeline_class_name
from examples.generate_many import add_model_arguments


logger = logging.getLogger("ray.serve")


MAX_BODY_BYTES = 2**16
MAX_PROMPT_CHARACTERS = 4000  # the text encoder reads 300 tokens


@dataclass
class ImageRequest:
    """What a request asks for. Whatever passes these checks can be part of a batch.

    Raises:
        TypeError, ValueError: a field is of another type, or its value is out of range.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise TypeError(f"`{field.name}` must be of type {field.type.__name__}, got {type(value).__name__}")
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if len(text) > MAX_PROMPT_CHARACTERS:
                raise ValueError(f"`{name}` must have at most {MAX_PROMPT_CHARACTERS} characters, got {len(text)}")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"`{name}` must be Unicode text, got a lone surrogate")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be from 0 to 2^63 - 1, got {self.seed}")


async def read_request(request: Request) -> ImageRequest | Response:
    """The request, or the answer that refuses it."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return PlainTextResponse(f"the body must have at most {MAX_BODY_BYTES} bytes\n", status_code=413)
    try:
        return ImageRequest(**json.loads(body))
    except (TypeError, ValueError) as error:
        return PlainTextResponse(f"{error}\n", status_code=400)
    except RecursionError:
        return PlainTextResponse("the JSON is nested too deeply\n", status_code=400)


class ImageGenerator:
    """A replica with a pipeline.

    Args:
        model: Hub id or folder.
        dtype: name of the weights' dtype.
        batch_size: images per batch, at most.
        wait: seconds to wait for further requests of a batch.
        options: further arguments of the pipeline.
    """

    def __init__(self, model: str, dtype: str, batch_size: int, wait: float, options: dict[str, Any]) -> None:
        import ray
        import torch
        from ray import serve

        from diffusers_sana import SanaPipeline

        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.pipe = SanaPipeline.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.options = options
        # Called with one request, it waits for others, and returns the answer to that one.
        self.generate = serve.batch(max_batch_size=batch_size, batch_wait_timeout_s=wait)(self.generate_batch)

    async def __call__(self, request: Request) -> Response:
        """Answers one request."""
        wanted = await read_request(request)
        return wanted if isinstance(wanted, Response) else await self.generate(wanted)

    async def generate_batch(self, requests: list[ImageRequest]) -> list[Response]:
        """Answers in the order of the requests; in a thread, so that the next batch can gather in the meantime."""
        return await asyncio.to_thread(self._generate, requests)

    def _generate(self, requests: list[ImageRequest]) -> list[Response]:
        import torch

        try:
            images = self.pipe(
                [request.prompt for request in requests],
                negative_prompt=[request.negative_prompt for request in requests],
                generator=[torch.Generator().manual_seed(request.seed) for request in requests],
                **self.options,
            ).images
        except Exception as error:
            if len(requests) > 1:  # only the faulty request fails
                return [self._generate([request])[0] for request in requests]
            logger.exception("a request failed")
            return [PlainTextResponse(f"{error}\n", status_code=500)]
        files = [io.BytesIO() for _ in images]
        for image, file in zip(images, files, strict=True):
            image.save(file, "png")
        return [Response(file.getvalue(), media_type="image/png") for file in files]


def application(
    model: str = SANA_EMOJI,
    dtype: str = "float32",
    batch_size: int = 4,
    wait: float = 0.05,
    replicas: int = 1,
    gpus_per_replica: float = 0,
    max_queue: int = 100,
    **options: Any,
) -> Any:
    """The `Application` for `serve.run`.

    Args:
        model, dtype, batch_size, wait, options: as in `ImageGenerator`.
        replicas: pipelines that run at the same time.
        gpus_per_replica: 0 runs on CPUs.
        max_queue: waiting requests, at most; further ones get a 503.
    """
    from ray import serve

    deployment = serve.deployment(
        ImageGenerator,
        num_replicas=replicas,
        ray_actor_options={"num_gpus": gpus_per_replica},
        max_ongoing_requests=2 * batch_size,  # one batch runs while the next gathers
        max_queued_requests=max_queue,
    )
    return deployment.bind(model, dtype, batch_size, wait, options)


def main() -> None:
    """The command line: a model and where to serve it."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_model_arguments(parser, batch_size=4)
    parser.add_argument("--wait", type=number(at_least=0), default=0.05, help="seconds to wait for a batch to fill")
    parser.add_argument("--replicas", type=integer(), default=1, help="pipelines that run at the same time")
    parser.add_argument("--gpus-per-replica", type=number(at_least=0), default=0, help="0 runs on CPUs")
    parser.add_argument("--max-queue", type=integer(), default=100, help="waiting requests, at most; others get a 503")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=integer(at_most=65535), default=8000, help="port to listen at")
    args = parser.parse_args()
    pipeline_class_name(args.model)  # an error at once if there is no such model

    from ray import serve

    serve.start(http_options={"host": args.host, "port": args.port})
    app = application(
        args.model,
        args.dtype,
        args.batch_size,
        args.wait,
        args.replicas,
        args.gpus_per_replica,
        args.max_queue,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
    )
    serve.run(app, blocking=True)


if __name__ == "__main__":
    run_script(main)
