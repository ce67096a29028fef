"""Draws a picture for each line of a text file, on as many devices as there are.

    accelerate launch --num_processes 2 examples/generate_many.py --prompts prompts.txt --out pictures

On CPUs, where Accelerate launches one process only, use `torchrun --nproc_per_node 2` in its place.

Picture i is of line i and of seed `--seed` + i, whatever the number of processes. Pictures that are there already are
left alone, so a run that was stopped goes on where it was. Each PNG says of which prompt and seed it is.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import tqdm
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusers_sana import SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI


@dataclass(frozen=True)
class Task:
    """One picture to draw.

    Attributes:
        prompt: what it is of.
        seed: of its noise.
        path: where it goes.
    """

    prompt: str
    seed: int
    path: Path

    def is_done(self) -> bool:
        """Whether the picture is there, of this prompt and seed."""
        if not self.path.exists():
            return False
        with Image.open(self.path) as image:
            return (image.info.get("prompt"), image.info.get("seed")) == (self.prompt, str(self.seed))

    def save(self, image: Image.Image) -> None:
        """Writes the picture, whole or not at all."""
        info = PngInfo()
        info.add_itxt("prompt", self.prompt)
        info.add_text("seed", str(self.seed))
        unfinished = self.path.with_suffix(".unfinished")
        image.save(unfinished, "png", pnginfo=info)
        os.replace(unfinished, self.path)


def read_tasks(prompts: Path, out: Path, seed: int) -> list[Task]:
    """A task for each line that is not empty; its number is that of the line, from 0."""
    lines = enumerate(prompts.read_text(encoding="utf-8").splitlines())
    return [Task(line.strip(), seed + i, out / f"{i:06}.png") for i, line in lines if line.strip()]


def batches(tasks: Sequence[Task], batch_size: int) -> list[Sequence[Task]]:
    """The batches in which something is to be done.

    Cut before anything is left out or shared, and drawn whole: pictures of one batch have been computed together, and
    other company would round them otherwise.
    """
    cut = [tasks[start : start + batch_size] for start in range(0, len(tasks), batch_size)]
    return [batch for batch in cut if not all(task.is_done() for task in batch)]


def draw(pipe: Any, tasks: Sequence[Task], **options: Any) -> list[Image.Image]:
    """The pictures of one batch; `options` are further arguments of the pipeline."""
    generators = [torch.Generator().manual_seed(task.seed) for task in tasks]  # on the CPU: the same on every device
    return pipe([task.prompt for task in tasks], generator=generators, **options).images


def draw_all(pipe: Any, tasks: Sequence[Task], batch_size: int, **options: Any) -> Iterator[Path]:
    """Draws this process's share, and yields the path of each picture when it is written."""
    state = PartialState()
    todo = batches(tasks, batch_size)
    state.wait_for_everyone()  # all must have looked before anybody writes
    for batch in tqdm(todo[state.process_index :: state.num_processes], unit="batch"):
        for task, image in zip(batch, draw(pipe, batch, **options), strict=True):
            if not task.is_done():
                task.save(image)
                yield task.path


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
    args = parser.parse_args()

    state = PartialState(cpu=not torch.accelerator.is_available())
    args.out.mkdir(parents=True, exist_ok=True)
    tasks = read_tasks(args.prompts, args.out, args.seed)
    pipe = SanaPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(state.device)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    num_drawn = sum(1 for _ in draw_all(pipe, tasks, args.batch_size, **options))
    print(f"process {state.process_index}: drew {num_drawn} of {len(tasks)} pictures")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
