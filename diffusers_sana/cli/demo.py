"""`diffusers-sana demo`: a web page to try the models."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from diffusers_sana.arguments import UsageError, add_device, add_model, find_device, integer
from diffusers_sana.checkpoints import SANA_EMOJI, SANA_EMOJI_EDGES, VILA_U_EMOJI
from diffusers_sana.cli.pipelines import FPS, PIPELINES, kind_of, video_components
from diffusers_sana.loading import checkpoint_path, find_pipeline_class, load_on, pipeline_class_name


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(command, "sana-emoji", "Hub id or folder of a Sana or SANA-Sprint, not quantized, or of a SANA-Video")
    command.add_argument(
        "--controlnet",
        type=checkpoint_path,
        help="Hub id or folder of a ControlNet for sketches, white lines on black; default: the bundled one for"
        " sana-emoji, else none",
    )
    command.add_argument("--port", type=integer(at_most=65535), help="default: the first free one from 7860")
    command.add_argument("--share", action="store_true", help="also serve a public address, through Gradio's servers")
    add_device(command, dtype="bfloat16")


def check_port(port: int) -> None:
    """Raises where nothing can be served there."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(f"--port {port} cannot be used: {error.strerror}; leave it out for a free one") from None


def run(args: argparse.Namespace) -> None:
    """Serves a page that generates each image in 16 and in 4 bits, or videos, and answers questions about images."""
    controlnet = args.controlnet or (SANA_EMOJI_EDGES if args.model == SANA_EMOJI else None)
    if find_spec("gradio") is None:
        raise OSError("demo needs gradio, which is not installed: pip install 'diffusers_sana[demo]'")
    name, kind = kind_of(args.model)
    if name not in ("SanaPipeline", "SanaSprintPipeline") and kind not in FPS:
        raise UsageError(
            f"--model must be a Sana or a SANA-Sprint, or a SANA-Video, which {args.model} is not; leave it out"
        )
    pipeline_class_name(VILA_U_EMOJI)  # an error at once if it is not installed
    if controlnet is not None and name != "SanaPipeline":
        raise UsageError(f"--controlnet must be left out for a {kind}, which {args.model} is")
    if args.port is not None:
        check_port(args.port)

    import torch

    import diffusers_sana
    from diffusers_sana import SanaControlNetModel, VilaUPipeline
    from diffusers_sana.demo.comparison import Comparison
    from diffusers_sana.demo.page import build_page, build_video_page, serve
    from diffusers_sana.demo.videos import Videos

    device = find_device(args.device)
    if kind in FPS:
        video_class = getattr(diffusers_sana, PIPELINES[(kind,)])
        pipe = load_on(device, video_class, args.model, args.dtype, **video_components(args.model))
        answerer = load_on(device, VilaUPipeline, str(VILA_U_EMOJI), "float32")
        page = build_video_page(Videos(pipe, FPS[kind]), answerer, Path(args.model).name)
        serve(page, args.port, args.share)
        return
    pipe = load_on(device, find_pipeline_class(args.model), args.model, args.dtype)
    if controlnet is not None:
        controlnet = SanaControlNetModel.from_pretrained(controlnet, dtype=getattr(torch, args.dtype)).to(device)
    comparison = Comparison(pipe, controlnet)
    print(comparison.report)
    answerer = load_on(device, VilaUPipeline, str(VILA_U_EMOJI), "float32")
    serve(build_page(comparison, answerer, Path(args.model).name), args.port, args.share)
