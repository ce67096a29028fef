"""`diffusers-sana demo`: a page to try it in."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from diffusers_sana.cli.common import add_device, find_device
from diffusers_sana.loading import checkpoint_path, find_pipeline_class


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument(
        "--model",
        type=checkpoint_path,
        default="sana-emoji",
        help="Hub id or folder of Sana or SANA-Sprint in 16 bit; default: the small bundled sana-emoji",
    )
    command.add_argument("--port", type=int, help="of this machine; default: the first free one from 7860")
    command.add_argument("--share", action="store_true", help="also an address for others, by Gradio's servers")
    add_device(command, dtype="bfloat16")


def run(args: argparse.Namespace) -> None:
    """Serves a page that draws one seed in 16 and in 4 bit, and answers questions about pictures."""
    if find_spec("gradio") is None:
        raise OSError("demo needs gradio, which is not installed: pip install 'diffusers_sana[demo]'")
    import torch

    from diffusers_sana import SanaPipeline, SanaSprintPipeline, VilaUPipeline
    from diffusers_sana.checkpoints import VILA_U_EMOJI
    from diffusers_sana.demo.comparison import Comparison
    from diffusers_sana.demo.page import build_page, serve

    pipeline_class, device = find_pipeline_class(args.model), find_device(args)
    if pipeline_class not in (SanaPipeline, SanaSprintPipeline):
        raise ValueError(f"--model must be a Sana or a SANA-Sprint, which {args.model} is not; leave it out")
    pipe = pipeline_class.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(device)
    comparison = Comparison(pipe)
    print(comparison.report)
    answerer = VilaUPipeline.from_pretrained(VILA_U_EMOJI, torch_dtype=torch.float32).to(device)
    serve(build_page(comparison, answerer, Path(args.model).name), args.port, args.share)
