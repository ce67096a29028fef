"""`diffusers-sana chat`: answer a question about an image."""

import argparse
from pathlib import Path

from diffusers_sana.arguments import (
    UsageError,
    add_device,
    add_hub,
    add_model,
    check_file,
    find_device,
    integer,
    open_input,
    seed,
)
from diffusers_sana.checks import check_texts
from diffusers_sana.loading import load_on, pipeline_class_name


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("image", metavar="IMAGE", help="file or address of the image")
    command.add_argument("question", metavar="QUESTION", help="what to answer")
    add_model(command, "vila-u-emoji", "Hub id or folder of a VILA-U")
    add_hub(command)
    command.add_argument("--max-new-tokens", type=integer(), default=256, help="length limit of the answer")
    command.add_argument("--seed", type=seed, help="sample an answer; default: the most probable one")
    add_device(command, dtype=None)


def run(args: argparse.Namespace) -> None:
    """Prints the answer to a question about an image."""
    is_local = not args.image.startswith(("http://", "https://"))
    if is_local:
        check_file("IMAGE", args.image)
    if not args.question.strip():
        raise UsageError("QUESTION must ask something, got an empty one")
    check_texts("question", [args.question], args.question)
    if pipeline_class_name(args.model, args.revision) != "VilaUPipeline":
        raise UsageError(f"--model must be a VILA-U, which {args.model} is not; leave it out for the bundled one")

    import torch
    from diffusers.utils import load_image

    from diffusers_sana import VilaUPipeline

    device = find_device(args.device)
    image = open_input("IMAGE", Path(args.image)) if is_local else load_image(args.image)
    pipe = load_on(device, VilaUPipeline, args.model, args.dtype, revision=args.revision, variant=args.variant)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    print(pipe.chat(image, args.question, max_new_tokens=args.max_new_tokens, do_sample=args.seed is not None))
