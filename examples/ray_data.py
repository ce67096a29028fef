"""Draws a picture for each line of a text file with Ray Data, on the devices of a whole cluster.

    python -m examples.ray_data --prompts prompts.txt --out pictures --actors 4 --gpus_per_actor 1

The pictures, their seeds and their files are those of `generate_many.py`: either goes on where the other has stopped.
`--out` must be a folder that all machines see.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import ray
import torch

from diffusers_sana import SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.files import locked
from examples.generate_many import Task, batches, draw, read_tasks, settings_of


class Drawer:
    """An actor with a pipeline.

    Args:
        model: Hub id or folder.
        dtype: name of the weights' dtype.
        options: further arguments of the pipeline.
    """

    def __init__(self, model: str, dtype: str, options: dict[str, Any]) -> None:
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.pipe = SanaPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype)).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.options = options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Generates what columns `prompt` and `seed` say, writes to `path`, and returns the paths."""
        columns = zip(batch["prompt"], batch["seed"], batch["path"], batch["settings"], strict=True)
        tasks = [Task(str(prompt), int(seed), Path(path), str(settings)) for prompt, seed, path, settings in columns]
        for task, image in zip(tasks, draw(self.pipe, tasks, **self.options), strict=True):
            task.save(image)
        return {"path": batch["path"]}


def draw_all(
    tasks: list[Task],
    batch_size: int,
    model: str = SANA_EMOJI,
    dtype: str = "float32",
    num_actors: int = 1,
    gpus_per_actor: float = 0,
    **options: Any,
) -> list[str]:
    """Draws what is not there yet, and returns the paths of the pictures drawn.

    Args:
        tasks: the pictures.
        batch_size: pictures drawn at a time.
        model, dtype: as in `Drawer`.
        num_actors: pipelines that draw at the same time.
        gpus_per_actor: 0 draws on CPUs; a half lets two actors share a GPU.
        options: further arguments of the pipeline.
    """
    todo = [
        [asdict(task) | {"path": str(task.path.resolve())} for task in batch] for batch in batches(tasks, batch_size)
    ]
    if not todo:
        return []
    drawn = ray.data.from_arrow([pyarrow.Table.from_pylist(batch) for batch in todo]).map_batches(
        Drawer,
        fn_constructor_kwargs={"model": model, "dtype": dtype, "options": options},
        batch_size=None,  # a batch is a block, and a block one of the tables
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_gpus=gpus_per_actor,
    )
    return [row["path"] for row in drawn.take_all()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--model", default=SANA_EMOJI, help="Hub id or folder; default: the bundled checkpoint")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures drawn at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the first line")
    parser.add_argument("--steps", type=int, default=20, help="evaluations of the transformer")
    parser.add_argument("--guidance_scale", type=float, default=4.5, help="how strictly to follow the prompts")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--actors", type=int, default=1, help="pipelines that draw at the same time")
    parser.add_argument("--gpus_per_actor", type=float, default=0, help="0 draws on CPUs")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    tasks = read_tasks(args.prompts, args.out, args.seed, settings_of(args))
    with locked(args.out / ".lock", f"generates into {str(args.out)!r}"):
        drawn = draw_all(
            tasks,
            args.batch_size,
            args.model,
            args.dtype,
            args.actors,
            args.gpus_per_actor,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
        )
    print(f"drew {len(drawn)} of {len(tasks)} pictures")


if __name__ == "__main__":
    main()
