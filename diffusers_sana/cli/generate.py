"""`diffusers-sana generate`: generate images or videos from a prompt, and perhaps from other images."""

import argparse
import logging
import re
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusers_sana.arguments import (
    UsageError,
    add_device,
    add_hub,
    add_model,
    check_file,
    file_path,
    find_device,
    integer,
    number,
    read_prompts,
    seed,
)
from diffusers_sana.checkpoints import (
    BUNDLED_CONTROLNETS,
    BUNDLED_LORAS,
    SANA_EMOJI,
    SANA_EMOJI_EDGES,
    SANA_EMOJI_SPRINT,
)
from diffusers_sana.checks import check_frames, check_size, check_texts
from diffusers_sana.cli.output import Task, name_files, save
from diffusers_sana.cli.pipelines import (
    FPS,
    IMAGES,
    LEFT_OUT,
    SANA,
    SCHEDULERS,
    SPRINT,
    VIDEO,
    VILA_U,
    generate,
    kind_of,
    load,
    option,
    read_images,
)
from diffusers_sana.cli.record import LoRA, make_record
from diffusers_sana.cli.words import unknown_words
from diffusers_sana.files import safetensors_header
from diffusers_sana.loading import check_version, checkpoint_path, read_config


logger = logging.getLogger(__name__)


def sigmas(text: str) -> list[float]:
    """The `type` of `--sigmas`: descending noise levels, separated by commas."""
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 1,0.7,0.3, got {text!r}") from None
    if not all(0 < value <= 1 for value in values) or sorted(set(values), reverse=True) != values:
        raise argparse.ArgumentTypeError(f"must descend from at most 1 to above 0, got {text!r}")
    return values


def strength(text: str) -> float:
    """The `type` of `--strength`."""
    value = number(at_most=1)(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def fps(text: str) -> float:
    """The `type` of `--fps`."""
    value = number(at_most=240)(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 240, got {text}")
    return value


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = command.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to generate")
    add("--prompts", type=file_path, metavar="FILE", help="in place of PROMPT: one prompt per line of a text file")
    add("--negative-prompt", metavar="TEXT", help="what to avoid")
    add_model(command, "sana-emoji", "Hub id or folder of a Sana, SANA-Sprint or VILA-U, or a bundled checkpoint")
    add_hub(command)
    add("--lora", type=LoRA.parse, action="append", default=[], metavar="FILE[:SCALE]", help="may be repeated")
    add("--image", type=file_path, metavar="FILE", help="image to change")
    add("--video", action="store_true", help="generate a video, with a SANA-Video as --model")
    add("--frames", type=integer(at_most=2**16), help="of the video; default: the model's, 81 or 193")
    add("--fps", type=fps, help="frames per second of the file; default: the model's, 16 or 24")
    add("--motion-score", type=integer(0, 1000), metavar="N", help="how much is to move, as the model was taught it")
    add("--strength", type=strength, help="how far to go from --image, above 0 to 1; default: 0.6, or 1 with --mask")
    add("--mask", type=file_path, metavar="FILE", help="repaint --image only where this one is white")
    add("--control-image", type=file_path, metavar="FILE", help="image to follow, such as white edges on black")
    add("--controlnet", metavar="MODEL", help="that follows it; default for the bundled models: sana-emoji-edges")
    add("--control-scale", type=number(), metavar="SCALE", help="strength of the control; default: 1")
    add("--height", type=integer(at_most=2**14), help="in pixels; default: the checkpoint's")
    add("--width", type=integer(at_most=2**14), help="in pixels; default: the checkpoint's")
    add("--steps", type=integer(at_most=1000), help="denoising steps; default: 20, or 2 for SANA-Sprint")
    add("--guidance-scale", type=number(), metavar="SCALE", help="weight of the prompt; default: the model's")
    add("--scheduler", choices=SCHEDULERS, help="solver; default: the checkpoint's")
    add("--sigmas", type=sigmas, metavar="S,S,...", help="noise levels before the shift, in place of --steps")
    add("--num-images", type=integer(at_most=10_000), default=1, help="images or videos of each prompt; default: 1")
    add("--seed", type=seed, default=0, help="of the first image; the next ones have the next seeds; default: 0")
    add(
        "--out",
        type=file_path,
        default=Path("outputs"),
        metavar="FILE|DIR",
        help="image or video file, or folder of files named by prompt and seed; default: outputs. A PNG and a video"
        " say how they were made",
    )
    add("--overwrite", action="store_true", help="replace the files that are there")
    add_device(command, dtype=None)


def run(args: argparse.Namespace) -> None:
    """Generates images or videos from a prompt, and perhaps from other images, and prints the paths of their files.

    They do not depend on how many are generated at once: each has its own seed.
    """
    started = time.perf_counter()
    kind, tasks = check(args)
    device = find_device(args.device)
    images = read_images(args)
    record = make_record(args)
    pipe = load(args, kind, device)
    loaded = time.perf_counter()
    for task in tasks:
        words = [] if args.lora else unknown_words(args.model, task.prompt)  # a LoRA may teach words
        if words:
            logger.warning(
                f"{Path(args.model).name} was not taught: {', '.join(words)}. It knows the words on its card,"
                f" {Path(args.model, 'README.md')}."
            )
        made = generate(pipe, args, task, images)
        save(made, task, record(task, pipe), args.fps)
        print(task.path.resolve(), flush=True)
    generated = time.perf_counter()
    print(f"loaded in {loaded - started:.1f} s, generated in {generated - loaded:.1f} s on {device}", file=sys.stderr)


def check(args: argparse.Namespace) -> tuple[str, list[Task]]:
    """What is to be done: the kind of pipeline, and each image or video with its file. Loads nothing.

    Bundled ControlNets and LoRAs that are named as the model are put where they belong.

    Raises:
        UsageError, OSError: naming the option.
    """
    _check_together(args)
    prompts = _prompts(args)
    if args.seed + args.num_images > 2**63:
        raise UsageError(f"--seed must leave room for --num-images, {args.num_images}, below 2**63, got {args.seed}")
    seeds = range(args.seed, args.seed + args.num_images)
    tasks = name_files(args.out, prompts, seeds, args.overwrite, args.video, args.fps)
    for name in IMAGES:
        if getattr(args, name) is not None:
            check_file(option(name), getattr(args, name))
    if args.lora and find_spec("peft") is None:
        raise ModuleNotFoundError("--lora needs peft, which is not installed: pip install peft")
    for lora in args.lora:
        _check_lora(lora)
    kind = _check_model(args)
    if args.video:
        args.fps = FPS[kind] if args.fps is None else args.fps
        _check_video(args)
    elif kind != VILA_U:
        _check_sizes(args)
    return kind, tasks


def _check_together(args: argparse.Namespace) -> None:
    """Options that need or exclude each other."""
    if args.model in BUNDLED_CONTROLNETS.values():
        if args.control_image is None:
            raise UsageError(f"--model {Path(args.model).name} needs --control-image FILE")
        args.model, args.controlnet = SANA_EMOJI, args.controlnet or args.model
    elif args.model in BUNDLED_LORAS.values():
        args.model, args.lora = SANA_EMOJI, [LoRA(args.model), *args.lora]
    if args.control_image is not None and args.controlnet is None and args.model in (SANA_EMOJI, SANA_EMOJI_SPRINT):
        args.controlnet = SANA_EMOJI_EDGES
    for name, needed in (
        ("strength", "image"),
        ("mask", "image"),
        ("controlnet", "control_image"),
        ("control_scale", "control_image"),
    ):
        if getattr(args, name) is not None and getattr(args, needed) is None:
            raise UsageError(f"{option(name)} needs {option(needed)} FILE")
    if not args.video and (
        wrong := [option(name) for name in ("frames", "fps", "motion_score") if getattr(args, name) is not None]
    ):
        raise UsageError(f"{', '.join(wrong)} must be given with --video, or left out")
    for name, other in (("sigmas", "steps"), ("prompts", "prompt")):
        if getattr(args, name) is not None and getattr(args, other) is not None:
            raise UsageError(
                f"{option(name)} and {'PROMPT' if other == 'prompt' else option(other)} exclude each other"
            )
    if args.sigmas is not None and args.scheduler is not None and not SCHEDULERS[args.scheduler][1]:
        able = ", ".join(name for name, (_, takes_sigmas) in SCHEDULERS.items() if takes_sigmas)
        raise UsageError(f"--scheduler must be one of {able} with --sigmas, got {args.scheduler}")


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is not None:
        prompts = read_prompts("--prompts", args.prompts)
    else:
        prompts = [args.prompt]
    if args.prompts is None and not (args.prompt or "").strip():
        raise UsageError("PROMPT must say what to generate, or --prompts FILE must be given")
    check_texts("prompts" if args.prompts else "prompt", prompts, prompts)
    if args.negative_prompt is not None:
        check_texts("negative_prompt", [args.negative_prompt], args.negative_prompt)
    return prompts


def _check_lora(lora: LoRA) -> None:
    place = Path(checkpoint_path(lora.place))
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if place.is_dir() and not files:
        raise UsageError(f"--lora must have a .safetensors file, but there is none in {place}")
    if not place.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", lora.place) and place.suffix != ".safetensors":
        return  # on the Hub
    for file in files:
        check_file("--lora", file)
        if file.suffix != ".safetensors":
            raise UsageError(f"--lora must be a .safetensors file, got {file}")
        try:
            safetensors_header(file)
        except ValueError as error:
            raise UsageError(f"--lora {error}") from None


def _check_model(args: argparse.Namespace) -> str:
    """The kind of the model, which the other options must fit."""
    try:
        name, kind = kind_of(args.model, args.revision)
        check_version(args.model, args.revision, args.variant)
    except FileNotFoundError as error:
        raise UsageError(f"--model: {error}") from None
    if kind is None:
        raise UsageError(
            f"--model must be a {SANA}, {SPRINT} or {VILA_U}, or with --video a {VIDEO}, but {args.model} is a {name}"
        )
    if args.video and kind not in FPS:
        raise UsageError(f"--video needs --model, the folder or Hub id of a {VIDEO}, but {args.model} is a {kind}")
    if not args.video and kind in FPS:
        raise UsageError(f"--video must be given for {args.model}, which is a {kind}")
    if wrong := [option(given) for given in LEFT_OUT[kind] if getattr(args, given) not in (None, [])]:
        raise UsageError(f"{', '.join(wrong)} must be left out for {kind}, which {args.model} is")
    if kind == SPRINT and args.image is not None and args.control_image is not None:
        raise UsageError(f"--image and --control-image exclude each other for {kind}, which {args.model} is")
    has_controlnet = "ControlNet" in name
    if has_controlnet and args.control_image is None:
        raise UsageError(f"--control-image must be given for {args.model}, which is a {name}")
    if args.control_image is not None and args.controlnet is None and not has_controlnet:
        raise UsageError("--control-image needs --controlnet, the Hub id or folder of a ControlNet")
    if args.controlnet is not None:
        try:
            found = (read_config(args.controlnet, "config.json") or {}).get("_class_name", "no model")
        except FileNotFoundError as error:
            raise UsageError(f"--controlnet: {error}") from None
        if found != "SanaControlNetModel":
            raise UsageError(f"--controlnet must be the folder of a ControlNet, but {args.controlnet} has {found}")
    return kind


def _check_video(args: argparse.Namespace) -> None:
    """Frames and sizes that the model cannot generate."""
    vae = read_config(args.model, "vae/config.json", args.revision)
    transformer = read_config(args.model, "transformer/config.json", args.revision) or {}
    if vae is None:
        raise UsageError(f"--model must have an autoencoder in its folder `vae`, which {args.model} lacks")
    step, cell = _compression(vae)
    patch, longest = transformer.get("patch_size", (1, 2, 2)), transformer.get("rope_max_seq_len", 1024)
    sides = (step, cell, longest, *patch) if isinstance(patch, list | tuple) and len(patch) == 3 else (None,)
    if not all(isinstance(side, int) and side > 0 for side in sides):
        return  # the models say what is wrong with their configs
    if args.frames is not None:
        reason = "`rope_max_seq_len` of the transformer"
        check_frames(args.frames, step, patch[0], longest * patch[0], reason)
    for name in ("height", "width"):
        if getattr(args, name) is not None:
            check_size(name, getattr(args, name), cell * max(patch[1:]))


def _compression(vae: dict[str, Any]) -> tuple[Any, Any]:
    """Frames and pixels of a latent by the config of an autoencoder, see `video_decoding.compression`."""
    if isinstance(channels := vae.get("encoder_block_out_channels"), list):
        return 1, 2 ** (len(channels) - 1)
    if vae.get("_class_name") == "AutoencoderKLLTX2Video":
        return vae.get("temporal_compression_ratio"), vae.get("spatial_compression_ratio")
    return vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)


def _check_sizes(args: argparse.Namespace) -> None:
    """Sizes that the model cannot generate."""
    if (args.height, args.width) == (None, None):
        return
    vae = read_config(args.model, "vae/config.json", args.revision) or {}
    transformer = read_config(args.model, "transformer/config.json", args.revision) or {}
    channels, patch = vae.get("encoder_block_out_channels"), transformer.get("patch_size")
    if not isinstance(channels, list) or not isinstance(patch, int) or patch < 1:
        return  # the models say what is wrong with their configs
    for name in ("height", "width"):
        if getattr(args, name) is not None:
            check_size(name, getattr(args, name), 2 ** (len(channels) - 1) * patch)
