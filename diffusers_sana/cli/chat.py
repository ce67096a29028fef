"""`diffusers-sana chat`: answer a question about an image."""

import argparse

from diffusers_sana.arguments import add_device, add_model, check_file, find_device, integer, seed
from diffusers_sana.loading import load_on, pipeline_class_name


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("image", help="file or address of the image")
    command.add_argument("question", help="what to answer")
    add_model(command, "vila-u-emoji", "Hub id or folder of a VILA-U")
    command.add_argument("--max-new-tokens", type=integer(), default=256, help="length limit of the answer")
    command.add_argument("--seed", type=seed, help="sample an answer; default: the most probable one")
    add_device(command)


def run(args: argparse.Namespace) -> None:
    """Prints the answer to a question about an image."""
    check_file("IMAGE", args.image)
    if pipeline_class_name(args.model) != "VilaUPipeline":
        raise ValueError(f"--model must be a VILA-U, which {args.model} is not; leave it out for the bundled one")

    import torch

    from diffusers_sana import VilaUPipeline

    pipe = load_on(find_device(args.device), VilaUPipeline, args.model, args.dtype)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    print(pipe.chat(args.image, args.question, max_new_tokens=args.max_new_tokens, do_sample=args.seed is not None))
