"""The command line: `diffusers-sana generate "a red apple on a blue background"`, `quantize`, `env`."""

import argparse
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


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


def quantize(args: argparse.Namespace) -> None:
    """Saves a pipeline with its transformer in 4 bits (SVDQuant). Called again, goes on where it was cut off."""
    import torch

    from diffusers_sana import SVDQuantConfig
    from diffusers_sana import quantize as quantize_pipeline

    prompts = None
    if args.prompts is not None:
        prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    config = SVDQuantConfig(precision=args.precision, rank=args.rank, gptq=args.gptq)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = _load_pipeline(args.model, getattr(torch, args.dtype)).to(device)
    report = quantize_pipeline(
        pipe,
        config,
        prompts=prompts,
        components=args.components,
        folder=args.out,
        num_inference_steps=args.steps,
        seed=args.seed,
    )
    print(args.out.resolve())
    print(report)


def _load_pipeline(model: str, dtype: Any) -> Any:
    """Of whatever class its index names; ours in place of its namesake in diffusers."""
    from diffusers import DiffusionPipeline

    from diffusers_sana import SanaPipeline

    name = DiffusionPipeline.load_config(model).get("_class_name")
    cls = SanaPipeline if name == SanaPipeline.__name__ else DiffusionPipeline
    return cls.from_pretrained(model, torch_dtype=dtype)


def env(args: argparse.Namespace) -> None:
    """Says what will run on this machine, and why."""
    import torch

    from diffusers_sana import __version__
    from diffusers_sana.kernels import int8_linear_cpu
    from diffusers_sana.kernels.dispatch import ENVIRONMENT_VARIABLE, current_kernel_mode, kernel_mode, use_triton
    from diffusers_sana.quantizers.svdquant.compute_mode import best_mode, why_best_mode

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'diffusers_sana':15} {__version__}")
    for package in ("torch", "diffusers", "transformers", "peft", "triton"):
        try:
            installed = version(package)
        except PackageNotFoundError:
            installed = "not installed"
        print(f"{package:15} {installed}")
    print(f"{'python':15} {platform.python_version()} on {platform.platform()}")

    cpu = torch.backends.cpu.get_cpu_capability() + (" with VNNI" if int8_linear_cpu.levels() == 127 else "")
    print(f"{'processor':15} {cpu}, {torch.get_num_threads()} threads{_memory()}")
    if device.type == "cuda":
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        name = torch.cuda.get_device_name()
        print(f"{'GPU':15} {name}, compute capability {capability}, {free:.1f} of {total:.1f} GiB free")
    else:
        print(f"{'GPU':15} none that PyTorch can use")

    mode = current_kernel_mode()
    runs, why = "PyTorch", "asked for by name" if mode == "torch" else "Triton needs a GPU"
    if mode != "torch" and device.type != "cpu":
        try:
            with kernel_mode("triton"):
                use_triton("any", torch.empty(1, device=device))
            runs, why = "Triton", "this GPU can"
        except RuntimeError as error:
            why = str(error)
    print(f"{'operations':15} {runs} in mode {mode!r} of {ENVIRONMENT_VARIABLE}: {why}")
    for precision in ("int4", "nvfp4"):
        print(f"{precision + ' layers':15} {best_mode(device, precision)}: {why_best_mode(device, precision)}")


def _memory() -> str:
    """Of the machine, where its system tells."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return ""
    return f", {total:.1f} GiB of memory"


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

    command = commands.add_parser("quantize", help="save a pipeline in 4 bits", description=quantize.__doc__)
    command.set_defaults(run=quantize)
    command.add_argument("model", help="Hub id or folder of a pipeline")
    command.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="new or empty folder to write")
    command.add_argument("--precision", default="int4", choices=("int4", "nvfp4"))
    command.add_argument("--rank", type=int, default=32, help="of the 16-bit branch")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="calibration prompts, one a line")
    command.add_argument("--gptq", action="store_true", help="smaller errors, slower; needs --prompts")
    command.add_argument("--components", nargs="+", default=["transformer"], help="models to quantize")
    command.add_argument("--steps", type=int, help="denoising steps of the calibration; default: the pipeline's")
    command.add_argument("--seed", type=int, default=0, help="of the calibration")
    command.add_argument("--device", help="default: cuda where there is one, else cpu")
    command.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))

    command = commands.add_parser("env", help="say what will run on this machine", description=env.__doc__)
    command.set_defaults(run=env)
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
