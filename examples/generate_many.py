"""Generate an image for each line of a text file, on as many devices as there are.

    accelerate launch --num_processes 2 examples/generate_many.py --prompts prompts.txt --out images

On CPUs, where Accelerate launches only one process, use `torchrun --nproc_per_node 2` instead.

Image i is of line i and of seed `--seed` + i, whatever the number of processes. Images that exist are kept, so run it
again to continue. Each PNG records its prompt, seed and settings; a folder with images of other settings is refused.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusers_sana.arguments import ArgumentParser, add_dtype, add_model, integer, number, run_script, seed
from diffusers_sana.files import atomic_write, differences, locked, model_identity, read_lines
from diffusers_sana.loading import find_pipeline_class, load_on, pipeline_class_name


@dataclass(frozen=True)
class Task:
    """One image to generate.

    Attributes:
        prompt: what it shows.
        seed: of its noise.
        path: where it is written.
        settings: everything else that the image depends on, in JSON.
    """

    prompt: str
    seed: int
    path: Path
    settings: str = "{}"

    def is_done(self) -> bool:
        """Whether the image exists, with this prompt and seed.

        Raises:
            ValueError: there is one of other settings, or of another program, which is not to be overwritten.
        """
        if not self.path.exists():
            return False
        with Image.open(self.path) as image:
            info = image.info
        if found := differences(json.loads(info.get("settings", "{}")), json.loads(self.settings)):
            raise ValueError(
                f"`--out` must be new or have images of the same settings, but those of {str(self.path)!r} differ:"
                f" {'; '.join(found)}. Choose another folder."
            )
        return (info.get("prompt"), info.get("seed")) == (self.prompt, str(self.seed))

    def save(self, image: Image.Image) -> None:
        """Writes the image, completely or not at all."""
        info = PngInfo()
        info.add_itxt("prompt", self.prompt)
        info.add_text("seed", str(self.seed))
        info.add_itxt("settings", self.settings)
        with atomic_write(self.path) as temporary:
            image.save(temporary, "png", pnginfo=info)


def read_tasks(prompts: Path, out: Path, seed: int, settings: Mapping[str, Any] | None = None) -> list[Task]:
    """A task for each line that is not empty; its number is the line's, from 0.

    Args:
        prompts: a text file in UTF-8.
        out: folder of the images.
        seed: of the first line.
        settings: everything else that the images depend on, as JSON values.
    """
    recorded = json.dumps(settings or {}, sort_keys=True)
    return [
        Task(line.strip(), seed + number - 1, out / f"{number - 1:06}.png", recorded)
        for number, line in read_lines(prompts)
    ]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What an image depends on besides prompt and seed."""
    names = ("model", "steps", "guidance_scale", "dtype")
    return {name: getattr(args, name) for name in names} | {"model_files": model_identity(args.model)}


def batches(tasks: Sequence[Task], batch_size: int) -> list[Sequence[Task]]:
    """The batches in which something is missing.

    Batches are cut before anything is left out or distributed, and generated whole: the images of a batch are computed
    together, and in other batches they would round differently.
    """
    cut = [tasks[start : start + batch_size] for start in range(0, len(tasks), batch_size)]
    return [batch for batch in cut if not all(task.is_done() for task in batch)]


def generate(pipe: Any, tasks: Sequence[Task], **options: Any) -> list[Image.Image]:
    """The images of one batch; `options` are further arguments of the pipeline."""
    import torch

    generators = [torch.Generator().manual_seed(task.seed) for task in tasks]  # on the CPU: the same on every device
    return pipe([task.prompt for task in tasks], generator=generators, **options).images


def generate_all(pipe: Any, tasks: Sequence[Task], batch_size: int, **options: Any) -> Iterator[Path]:
    """Generates this process's part, and yields the path of each image when it is written."""
    from accelerate import PartialState
    from accelerate.utils import tqdm

    state = PartialState()
    todo = batches(tasks, batch_size)
    state.wait_for_everyone()  # all must have looked before anyone writes
    for batch in tqdm(todo[state.process_index :: state.num_processes], unit="batch"):
        for task, image in zip(batch, generate(pipe, batch, **options), strict=True):
            if not task.is_done():
                task.save(image)
                yield task.path


def add_model_arguments(parser: ArgumentParser, batch_size: int) -> None:
    """The options of a pipeline that generates from many prompts, shared with the examples for Ray."""
    add_model(parser, "sana-emoji", "Hub id or folder")
    parser.add_argument("--batch-size", type=integer(), default=batch_size, help="images generated at a time, at most")
    parser.add_argument("--steps", type=integer(), help="denoising steps; default: the pipeline's")
    parser.add_argument("--guidance-scale", type=number(), help="weight of the prompt; default: the pipeline's")
    add_dtype(parser)


def add_prompt_arguments(parser: ArgumentParser) -> None:
    """The options of a file of prompts and a folder of images."""
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt per line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument("--seed", type=seed, default=0, help="of the first line")
    add_model_arguments(parser, batch_size=1)


def check_model(model: str) -> None:
    """Says at once, before anything is loaded, whether prompts can be generated from.

    Raises:
        OSError: there is no such model.
        ValueError: it is neither a Sana nor a SANA-Sprint.
    """
    if pipeline_class_name(model) not in ("SanaPipeline", "SanaSprintPipeline"):
        raise ValueError(f"--model must be a Sana or a SANA-Sprint, which {model} is not")


def call_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline that were given."""
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    return {name: value for name, value in options.items() if value is not None}


def prepare(args: argparse.Namespace) -> tuple[list[Task], dict[str, Any]]:
    """The tasks, and the arguments of the pipeline.

    Raises:
        OSError: there is no such model or file of prompts.
        ValueError: as `check_model`.
    """
    check_model(args.model)
    tasks = read_tasks(args.prompts, args.out, args.seed, settings_of(args))
    args.out.mkdir(parents=True, exist_ok=True)
    return tasks, call_options(args)


def main() -> None:
    """The command line: a file of prompts and a folder."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_prompt_arguments(parser)
    args = parser.parse_args()
    tasks, options = prepare(args)

    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    pipe = load_on(str(state.device), find_pipeline_class(args.model), args.model, args.dtype)
    pipe.set_progress_bar_config(disable=True)
    lock = locked(args.out / ".lock", f"generates into {str(args.out)!r}") if state.is_main_process else nullcontext()
    with lock:
        count = sum(1 for _ in generate_all(pipe, tasks, args.batch_size, **options))
        state.wait_for_everyone()
    print(f"process {state.process_index}: generated {count} of {len(tasks)} images")
    state.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
