"""`diffusers-sana generate`: write a picture of a prompt."""

import argparse
import sys
import time
from pathlib import Path

from diffusers_sana.cli.common import add_device, find_device, seed
from diffusers_sana.loading import checkpoint_path, find_pipeline_class


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("prompt", help="what to draw")
    command.add_argument(
        "--model",
        type=checkpoint_path,
        default="sana-emoji",
        help="Hub id or folder of Sana or VILA-U, or a bundled one: sana-emoji (the default), vila-u-emoji",
    )
    command.add_argument("--out", type=Path, default=Path("outputs/generated.png"), help="the file to write")
    command.add_argument("--negative-prompt", default="", help="what not to draw")
    command.add_argument("--height", type=int, help="pixels; default: what the checkpoint was made for")
    command.add_argument("--width", type=int, help="pixels; default: what the checkpoint was made for")
    command.add_argument("--steps", type=int, help="denoising steps; default: 20, or 2 for SANA-Sprint")
    command.add_argument(
        "--guidance-scale", type=float, help="how strictly to follow the prompt; default: the model's"
    )
    command.add_argument("--num-images", type=int, default=1, help="pictures to draw")
    command.add_argument("--seed", type=seed, default=0, help="same seed, same picture")
    add_device(command)


def run(args: argparse.Namespace) -> None:
    """Writes pictures of a prompt and prints their paths."""
    import torch

    from diffusers_sana import SanaPipeline, SanaSprintPipeline, VilaUPipeline

    started = time.perf_counter()
    options = {name: getattr(args, name) for name in ("height", "width", "steps") if getattr(args, name) is not None}
    pipeline_class = find_pipeline_class(args.model)
    is_vila_u = pipeline_class is VilaUPipeline
    if is_vila_u and options:
        raise ValueError(f"--{', --'.join(options)} must be left out for a VILA-U, which {args.model} is")
    if pipeline_class is not SanaSprintPipeline:
        options["negative_prompt"] = args.negative_prompt
    elif args.negative_prompt:
        raise ValueError(f"--negative-prompt must be left out for SANA-Sprint, which {args.model} is")
    if "steps" in options:
        options["num_inference_steps"] = options.pop("steps")
    if args.guidance_scale is not None:
        options["guidance_scale"] = args.guidance_scale
    # On the CPU, for the same noise on every device. VILA-U takes one a picture, which then depends on no other.
    seeds = range(args.seed, args.seed + (args.num_images if is_vila_u else 1))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    device, dtype = find_device(args), getattr(torch, args.dtype)
    if pipeline_class not in (SanaSprintPipeline, VilaUPipeline):
        pipeline_class = SanaPipeline
    pipe = pipeline_class.from_pretrained(args.model, torch_dtype=dtype).to(device)
    loaded = time.perf_counter()
    images, *_ = pipe(
        args.prompt,
        num_images_per_prompt=args.num_images,
        generator=generators if is_vila_u else generators[0],
        return_dict=False,
        **options,
    )
    drawn = time.perf_counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        path = args.out if i == 0 else args.out.with_stem(f"{args.out.stem}-{i}")
        image.save(path)
        print(path.resolve())
    print(f"loaded in {loaded - started:.1f} s, drawn in {drawn - loaded:.1f} s on {device}", file=sys.stderr)
