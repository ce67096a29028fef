"""`diffusers-sana generate`: generate images from a prompt."""

import argparse
import sys
import time
from pathlib import Path

from diffusers_sana.arguments import add_device, add_model, find_device, integer, number, seed
from diffusers_sana.loading import load_on, pipeline_class_name


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("prompt", help="what to generate")
    add_model(command, "sana-emoji", "Hub id or folder of a Sana or VILA-U, or vila-u-emoji (bundled)")
    command.add_argument("--out", type=Path, default=Path("outputs/generated.png"), help="the file to write")
    command.add_argument("--negative-prompt", default="", help="what to avoid")
    command.add_argument("--height", type=integer(), help="in pixels; default: the checkpoint's")
    command.add_argument("--width", type=integer(), help="in pixels; default: the checkpoint's")
    command.add_argument("--steps", type=integer(), help="denoising steps; default: 20, or 2 for SANA-Sprint")
    command.add_argument("--guidance-scale", type=number(), help="weight of the prompt; default: the model's")
    command.add_argument("--num-images", type=integer(), default=1, help="images to generate")
    command.add_argument("--seed", type=seed, default=0, help="same seed, same image")
    add_device(command)


def run(args: argparse.Namespace) -> None:
    """Generates images from a prompt and prints their paths."""
    from PIL import Image

    started = time.perf_counter()
    name = pipeline_class_name(args.model)
    is_vila_u, is_sprint = name == "VilaUPipeline", name == "SanaSprintPipeline"
    options = {name: getattr(args, name) for name in ("height", "width", "steps") if getattr(args, name) is not None}
    if is_vila_u and options:
        raise ValueError(f"--{', --'.join(options)} must be left out for a VILA-U, which {args.model} is")
    if not is_sprint:
        options["negative_prompt"] = args.negative_prompt
    elif args.negative_prompt:
        raise ValueError(f"--negative-prompt must be left out for SANA-Sprint, which {args.model} is")
    if "steps" in options:
        options["num_inference_steps"] = options.pop("steps")
    if args.guidance_scale is not None:
        options["guidance_scale"] = args.guidance_scale
    if args.out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out must end in an image format such as .png or .jpg, got {args.out}")

    import torch

    import diffusers_sana

    # On the CPU, for the same noise on every device. VILA-U takes one per image, which then depends on no other image.
    seeds = range(args.seed, args.seed + (args.num_images if is_vila_u else 1))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    device = find_device(args.device)
    pipeline_class = getattr(diffusers_sana, name if is_vila_u or is_sprint else "SanaPipeline")
    pipe = load_on(device, pipeline_class, args.model, args.dtype)
    loaded = time.perf_counter()
    images, *_ = pipe(
        args.prompt,
        num_images_per_prompt=args.num_images,
        generator=generators if is_vila_u else generators[0],
        return_dict=False,
        **options,
    )
    generated = time.perf_counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        path = args.out if i == 0 else args.out.with_stem(f"{args.out.stem}-{i}")
        image.save(path)
        print(path.resolve())
    print(f"loaded in {loaded - started:.1f} s, generated in {generated - loaded:.1f} s on {device}", file=sys.stderr)
