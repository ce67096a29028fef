"""`diffusers-sana chat`: ask about a picture."""

import argparse

from diffusers_sana.cli.common import add_device, check_there, find_device, seed
from diffusers_sana.loading import checkpoint_path, find_pipeline_class


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("image", help="file or address of the picture")
    command.add_argument("question", help="what to answer")
    command.add_argument(
        "--model",
        type=checkpoint_path,
        default="vila-u-emoji",
        help="Hub id or folder of VILA-U; default: the small bundled vila-u-emoji",
    )
    command.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    command.add_argument("--seed", type=seed, help="draw an answer by chance; default: the most probable one")
    add_device(command)


def run(args: argparse.Namespace) -> None:
    """Prints the answer to a question about a picture."""
    import torch

    from diffusers_sana import VilaUPipeline

    check_there("IMAGE", args.image)
    if find_pipeline_class(args.model) is not VilaUPipeline:
        raise ValueError(f"--model must be a VILA-U, which {args.model} is not; leave it out for the bundled one")
    pipe = VilaUPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(find_device(args))
    if args.seed is not None:
        torch.manual_seed(args.seed)
    print(pipe.chat(args.image, args.question, max_new_tokens=args.max_new_tokens, do_sample=args.seed is not None))
