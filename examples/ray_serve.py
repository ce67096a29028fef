"""Serves pictures over HTTP with Ray Serve; requests that come together are drawn together.

    python -m examples.ray_serve --replicas 1 --gpus_per_replica 1
    curl -d '{"prompt": "a red apple on a blue background", "seed": 1}' localhost:8000 -o apple.png

A request is a JSON object: `prompt`, and if wanted `negative_prompt` and `seed`. The answer is a PNG, or a 400 that
says what is wrong. Equal requests give equal pictures up to rounding, which the other pictures of a batch can change.
"""

import argparse
import asyncio
import io
import json
from dataclasses import dataclass, fields
from typing import Any

import ray
import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from diffusers_sana import SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI


@dataclass
class Order:
    """What a request asks for.

    Raises:
        TypeError, ValueError: a field is of another type.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise TypeError(f"`{field.name}` must be of type {field.type.__name__}, got {value!r}")


@serve.deployment
class Painter:
    """A replica with a pipeline.

    Args:
        model: Hub id or folder.
        dtype: name of the weights' dtype.
        batch_size: pictures drawn at a time, at most.
        wait: seconds that a request waits for others.
        options: further arguments of the pipeline.
    """

    def __init__(self, model: str, dtype: str, batch_size: int, wait: float, options: dict[str, Any]) -> None:
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.pipe = SanaPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype)).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.options = options
        self.paint.set_max_batch_size(batch_size)
        self.paint.set_batch_wait_timeout_s(wait)

    async def __call__(self, request: Request) -> Response:
        """Answers one request."""
        try:
            order = Order(**json.loads(await request.body()))
        except (TypeError, ValueError) as error:
            return PlainTextResponse(f"{error}\n", status_code=400)
        return Response(await self.paint(order), media_type="image/png")

    @serve.batch
    async def paint(self, orders: list[Order]) -> list[bytes]:
        """Pictures as PNG files. In a thread, so that the next batch can gather meanwhile."""
        return await asyncio.to_thread(self._paint, orders)

    def _paint(self, orders: list[Order]) -> list[bytes]:
        images = self.pipe(
            [order.prompt for order in orders],
            negative_prompt=[order.negative_prompt for order in orders],
            generator=[torch.Generator().manual_seed(order.seed) for order in orders],
            **self.options,
        ).images
        files = [io.BytesIO() for _ in images]
        for image, file in zip(images, files, strict=True):
            image.save(file, "png")
        return [file.getvalue() for file in files]


def application(
    model: str = SANA_EMOJI,
    dtype: str = "float32",
    batch_size: int = 4,
    wait: float = 0.05,
    replicas: int = 1,
    gpus_per_replica: float = 0,
    **options: Any,
) -> serve.Application:
    """What `serve.run` runs.

    Args:
        model, dtype, batch_size, wait, options: as in `Painter`.
        replicas: pipelines that draw at the same time.
        gpus_per_replica: 0 draws on CPUs.
    """
    deployment = Painter.options(num_replicas=replicas, ray_actor_options={"num_gpus": gpus_per_replica})
    return deployment.bind(model, dtype, batch_size, wait, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=SANA_EMOJI, help="Hub id or folder; default: the bundled checkpoint")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch_size", type=int, default=4, help="pictures drawn at a time, at most")
    parser.add_argument("--wait", type=float, default=0.05, help="seconds that a request waits for others")
    parser.add_argument("--replicas", type=int, default=1, help="pipelines that draw at the same time")
    parser.add_argument("--gpus_per_replica", type=float, default=0, help="0 draws on CPUs")
    parser.add_argument("--steps", type=int, default=20, help="evaluations of the transformer")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at")
    args = parser.parse_args()

    serve.start(http_options={"host": args.host, "port": args.port})
    app = application(
        args.model,
        args.dtype,
        args.batch_size,
        args.wait,
        args.replicas,
        args.gpus_per_replica,
        num_inference_steps=args.steps,
    )
    serve.run(app, blocking=True)


if __name__ == "__main__":
    main()
