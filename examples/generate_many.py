"""Draws a picture for each line of a text file, on as many devices as there are.

    accelerate launch --num_processes 2 examples/generate_many.py --prompts prompts.txt --out pictures

On CPUs, where Accelerate launches one process only, use `torchrun --nproc_per_node 2` in its place.

Image i is of line i and of seed `--seed` + i, whatever the number of processes. Images that are there already are left
alone, so a run that was stopped goes on where it was. Each PNG says of which prompt, seed and settings it is; a folder
with images of other settings is refused.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
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
from diffusers_sana.files import atomic_write, differences, locked, model_identity, read_lines


@dataclass(frozen=True)
class Task:
    """One picture to draw.

    Attributes:
        prompt: what it is of.
        seed: of its noise.
        path: where it goes.
        settings: all else that the image depends on, in JSON.
    """

    prompt: str
    seed: int
    path: Path
    settings: str = "{}"

    def is_done(self) -> bool:
        """Whether the image is there, of this prompt and seed.

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
        """Writes the image, whole or not at all."""
        info = PngInfo()
        info.add_itxt("prompt", self.prompt)
        info.add_text("seed", str(self.seed))
        info.add_itxt("settings", self.settings)
        with atomic_write(self.path) as temporary:
            image.save(temporary, "png", pnginfo=info)


def read_tasks(prompts: Path, out: Path, seed: int, settings: Mapping[str, Any] | None = None) -> list[Task]:
    """A task for each line that is not empty; its number is that of the line, from 0.

    Args:
        prompts: a text file in UTF-8.
        out: folder of the images.
        seed: of the first line.
        settings: all else that the images depend on, in JSON's values.
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
    tasks = read_tasks(args.prompts, args.out, args.seed, settings_of(args))
    pipe = SanaPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(state.device)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    lock = locked(args.out / ".lock", f"generates into {str(args.out)!r}") if state.is_main_process else nullcontext()
    with lock:
        num_drawn = sum(1 for _ in draw_all(pipe, tasks, args.batch_size, **options))
        state.wait_for_everyone()
    print(f"process {state.process_index}: drew {num_drawn} of {len(tasks)} pictures")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
