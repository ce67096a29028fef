"""The command line: `diffusers-sana generate "a red apple on a blue background"`."""

import argparse
import sys
import time
from pathlib import Path


def generate(args: argparse.Namespace) -> None:
    """Writes pictures of a prompt and prints their paths."""
    import torch

    from diffusers_sana import SanaPipeline
    from diffusers_sana.checkpoints import SANA_EMOJI

    started = time.perf_counter()
    model = SANA_EMOJI if args.model is None else args.model
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = SanaPipeline.from_pretrained(model, torch_dtype=getattr(torch, args.dtype)).to(device)
    loaded = time.perf_counter()
    images, *_ = pipe(
        args.prompt,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        num_images_per_prompt=args.num_images,
        generator=torch.Generator("cpu").manual_seed(args.seed),  # the same noise on every device
        return_dict=False,
    )
    drawn = time.perf_counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        path = args.out if i == 0 else args.out.with_stem(f"{args.out.stem}-{i}")
        image.save(path)
        print(path.resolve())
    print(f"loaded in {loaded - started:.1f} s, drawn in {drawn - loaded:.1f} s on {device}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    root = argparse.ArgumentParser(prog="diffusers-sana", description="Sana and its relatives, from the command line.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("generate", help="write a picture of a prompt", description=generate.__doc__)
    command.set_defaults(run=generate)
    command.add_argument("prompt", help="what to draw")
    command.add_argument("--model", help="Hub id or folder of a Sana pipeline; default: the small bundled checkpoint")
    command.add_argument("--out", type=Path, default=Path("outputs/generated.png"), help="the file to write")
    command.add_argument("--negative-prompt", default="", help="what not to draw")
    command.add_argument("--height", type=int, help="pixels; default: what the checkpoint was made for")
    command.add_argument("--width", type=int, help="pixels; default: what the checkpoint was made for")
    command.add_argument("--steps", type=int, default=20, help="denoising steps")
    command.add_argument("--guidance-scale", type=float, default=4.5, help="how strictly to follow the prompt")
    command.add_argument("--num-images", type=int, default=1, help="pictures to draw")
    command.add_argument("--seed", type=int, default=0, help="same seed, same picture")
    command.add_argument("--device", help="default: cuda where there is one, else cpu")
    command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    return root


def main(argv: list[str] | None = None) -> None:
    """Runs a command; what a user can mend ends it with one line."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"diffusers-sana: {error}")


if __name__ == "__main__":
    main()
