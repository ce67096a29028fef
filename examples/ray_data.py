"""Generate an image for each line of a text file with Ray Data, on the devices of a whole cluster.

    python -m examples.ray_data --prompts prompts.txt --out images --actors 4 --gpus-per-actor 1

Images, seeds and files are those of `generate_many.py`: either continues where the other has stopped. All machines
must see the folder `--out`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers_sana.arguments import ArgumentParser, integer, number, run_script
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.files import locked
from diffusers_sana.loading import find_pipeline_class, load_on
from examples.generate_many import Task, add_prompt_arguments, batches, generate, prepare


class Generator:
    """An actor with a pipeline.

    Args:
        model: Hub id or folder.
        dtype: name of the weights' dtype.
        options: further arguments of the pipeline.
    """

    def __init__(self, model: str, dtype: str, options: dict[str, Any]) -> None:
        import ray

        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.pipe = load_on(device, find_pipeline_class(model), model, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.options = options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Generates what the columns `prompt` and `seed` say, writes to `path`, and returns the paths."""
        columns = zip(batch["prompt"], batch["seed"], batch["path"], batch["settings"], strict=True)
        tasks = [Task(str(prompt), int(seed), Path(path), str(settings)) for prompt, seed, path, settings in columns]
        for task, image in zip(tasks, generate(self.pipe, tasks, **self.options), strict=True):
            task.save(image)
        return {"path": batch["path"]}


def generate_all(
    tasks: list[Task],
    batch_size: int,
    model: str = SANA_EMOJI,
    dtype: str = "float32",
    num_actors: int = 1,
    gpus_per_actor: float = 0,
    **options: Any,
) -> list[str]:
    """Generates what is missing, and returns the paths of the new images.

    Args:
        tasks: the images.
        batch_size: images generated at a time.
        model, dtype: as in `Generator`.
        num_actors: pipelines that run at the same time.
        gpus_per_actor: 0 runs on CPUs; 0.5 lets two actors share a GPU.
        options: further arguments of the pipeline.
    """
    import pyarrow
    import ray

    todo = [
        [asdict(task) | {"path": str(task.path.resolve())} for task in batch] for batch in batches(tasks, batch_size)
    ]
    if not todo:
        return []
    generated = ray.data.from_arrow([pyarrow.Table.from_pylist(batch) for batch in todo]).map_batches(
        Generator,
        fn_constructor_kwargs={"model": model, "dtype": dtype, "options": options},
        batch_size=None,  # a batch is a block, and a block one of the tables
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_gpus=gpus_per_actor,
    )
    return [row["path"] for row in generated.take_all()]


def main() -> None:
    """The command line: a file of prompts and a folder."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_prompt_arguments(parser)
    parser.add_argument("--actors", type=integer(), default=1, help="pipelines that run at the same time")
    parser.add_argument("--gpus-per-actor", type=number(at_least=0), default=0, help="0 runs on CPUs")
    args = parser.parse_args()
    tasks, options = prepare(args)
    with locked(args.out / ".lock", f"generates into {str(args.out)!r}"):
        generated = generate_all(
            tasks, args.batch_size, args.model, args.dtype, args.actors, args.gpus_per_actor, **options
        )
    print(f"generated {len(generated)} of {len(tasks)} images")


if __name__ == "__main__":
    run_script(main)
