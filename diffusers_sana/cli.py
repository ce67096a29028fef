"""The command line: `diffusers-sana generate "a red apple on a blue background"`, `chat`, `quantize`, `convert`."""

import argparse
import json
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

    from diffusers_sana import SanaPipeline, SanaSprintPipeline, VilaUPipeline

    started = time.perf_counter()
    options = {name: getattr(args, name) for name in ("height", "width", "steps") if getattr(args, name) is not None}
    pipeline_class = _pipeline_class(args.model)
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
    device, dtype = _device(args), getattr(torch, args.dtype)
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


def chat(args: argparse.Namespace) -> None:
    """Prints the answer to a question about a picture."""
    import torch

    from diffusers_sana import VilaUPipeline

    _check_there("IMAGE", args.image)
    if _pipeline_class(args.model) is not VilaUPipeline:
        raise ValueError(f"--model must be a VILA-U, which {args.model} is not; leave it out for the bundled one")
    pipe = VilaUPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(_device(args))
    if args.seed is not None:
        torch.manual_seed(args.seed)
    print(pipe.chat(args.image, args.question, max_new_tokens=args.max_new_tokens, do_sample=args.seed is not None))


def quantize(args: argparse.Namespace) -> None:
    """Saves a pipeline with its transformer in 4 bits (SVDQuant). Called again, goes on where it was cut off."""
    import torch

    from diffusers_sana import SVDQuantConfig
    from diffusers_sana import quantize as quantize_pipeline

    prompts = None
    if args.prompts is not None:
        prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    config = SVDQuantConfig(precision=args.precision, rank=args.rank, gptq=args.gptq)
    pipe = _pipeline_class(args.model).from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    report = quantize_pipeline(
        pipe.to(_device(args)),
        config,
        prompts=prompts,
        components=args.components,
        folder=args.out,
        num_inference_steps=args.steps,
        seed=args.seed,
    )
    print(args.out.resolve())
    print(report)


def convert(args: argparse.Namespace) -> None:
    """Writes the authors' file of Sana, its ControlNet or DC-AE as a folder of diffusers."""
    import torch

    from diffusers_sana.loaders.sana_official import convert_sana_file, plan_sana_file

    _check_there("FILE", args.file)
    fields = dict(args.set)
    if args.dry_run:
        print(plan_sana_file(args.file, args.component, **fields))
        return
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    plan = convert_sana_file(args.file, args.out, args.base, args.component, dtype, **fields)
    print(args.out.resolve())
    print(plan)


def _check_there(name: str, place: str) -> None:
    """Raises an OSError where `place` is neither a file nor an address: what reads it would call it a bad address."""
    if not str(place).startswith(("http://", "https://", "data:")) and not Path(place).is_file():
        raise OSError(f"{name} must be a file or an address, but there is no file {place}")


def _pipeline_class(model: str) -> Any:
    """The class that the index of a pipeline names; ours in place of its namesake in diffusers."""
    from diffusers import DiffusionPipeline
    from transformers.utils.hub import has_file

    from diffusers_sana import SanaPipeline, SanaSprintPipeline, VilaUPipeline

    if has_file(model, "config.json") and not has_file(model, DiffusionPipeline.config_name):
        return VilaUPipeline  # from a checkpoint of transformers; it says so where that is another model
    name = DiffusionPipeline.load_config(model).get("_class_name")
    ours = (SanaPipeline, SanaSprintPipeline, VilaUPipeline)
    return next((cls for cls in ours if cls.__name__ == name), DiffusionPipeline)


def _device(args: argparse.Namespace) -> str:
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _field(text: str) -> tuple[str, Any]:
    """A field of a config and its value: JSON, or a word."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _checkpoint(model: str) -> str:
    """The path of a bundled checkpoint; any other name as it is."""
    from diffusers_sana.checkpoints import BUNDLED

    return BUNDLED.get(model, model)


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
    command.add_argument(
        "--model",
        type=_checkpoint,
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
    command.add_argument("--seed", type=int, default=0, help="same seed, same picture")
    command.add_argument("--device", help="default: cuda where there is one, else cpu")
    command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))

    command = commands.add_parser("chat", help="ask about a picture", description=chat.__doc__)
    command.set_defaults(run=chat)
    command.add_argument("image", help="file or address of the picture")
    command.add_argument("question", help="what to answer")
    command.add_argument(
        "--model",
        type=_checkpoint,
        default="vila-u-emoji",
        help="Hub id or folder of VILA-U; default: the small bundled vila-u-emoji",
    )
    command.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    command.add_argument("--seed", type=int, help="draw an answer by chance; default: the most probable one")
    command.add_argument("--device", help="default: cuda where there is one, else cpu")
    command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))

    command = commands.add_parser("quantize", help="save a pipeline in 4 bits", description=quantize.__doc__)
    command.set_defaults(run=quantize)
    command.add_argument("model", type=_checkpoint, help="Hub id or folder of a pipeline, or a bundled checkpoint")
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

    command = commands.add_parser("convert", help="read the authors' files", description=convert.__doc__)
    command.set_defaults(run=convert)
    command.add_argument("file", type=Path, help=".pth or .safetensors of Sana, a ControlNet or DC-AE")
    command.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="new or empty folder to write")
    command.add_argument(
        "--base", metavar="PIPELINE", help="folder or Hub id that gives the other parts of a pipeline"
    )
    command.add_argument("--component", choices=("transformer", "controlnet"), help="of a file that has both")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the file's")
    command.add_argument(
        "--set",
        type=_field,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of the config, where the file does not tell: sample_size=32",
    )
    command.add_argument("--dry-run", action="store_true", help="check the file and say what would be written")

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
