"""Extract a LoRA from a Sana and a fine-tuned one: the change of its weights, cut to a rank.

    python examples/extract_lora.py --base my/sana --tuned my/fine-tuned-sana --rank 32 --prompts prompts.txt \
        --output-dir outputs/extracted

With a file of prompts, one per line, the base generates latents of each, and what its layers see there weighs the
errors; without one all directions count alike. The result is for `pipe.load_lora_weights("outputs/extracted")`, here
and in diffusers.
"""

from pathlib import Path

from diffusers_sana.arguments import (
    ArgumentParser,
    add_device,
    check_new_folder,
    file_path,
    find_device,
    integer,
    read_prompts,
    run_script,
)


def main(argv: list[str] | None = None) -> None:
    """The command line: two pipelines and a rank."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--base", required=True, help="folder or Hub id of the pipeline that the LoRA will be loaded on"
    )
    parser.add_argument("--tuned", required=True, help="folder or Hub id of the fine-tuned pipeline")
    parser.add_argument("--rank", type=integer(), default=16, help="rank of every layer that has changed; default: 16")
    parser.add_argument("--prompts", type=file_path, help="file of prompts, one per line; default: unweighted")
    parser.add_argument("--steps", type=integer(), default=20, help="steps of each prompt; default: 20")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("outputs/extracted"), help="default: outputs/extracted"
    )
    add_device(parser)
    args = parser.parse_args(argv)
    prompts = read_prompts("--prompts", args.prompts) if args.prompts else []
    check_new_folder("--output-dir", args.output_dir)

    import torch

    from diffusers_sana import extract_lora, find_pipeline_class
    from diffusers_sana.quantizers.svdquant.calibrate import run_pipeline

    dtype = getattr(torch, args.dtype)
    pipe = find_pipeline_class(args.base).from_pretrained(args.base, dtype=dtype).to(find_device(args.device))
    tuned = type(pipe.transformer).from_pretrained(args.tuned, subfolder="transformer", dtype=dtype)
    run = (lambda: run_pipeline(pipe, prompts, args.steps, 0, True, {})) if prompts else None
    found = extract_lora(pipe.transformer, tuned, args.rank, run)
    pipe.save_lora_weights(args.output_dir, transformer_lora_layers=found.state_dict)
    errors = sorted(found.errors.items(), key=lambda item: -item[1])
    print(f"{len(errors)} layers; the LoRA lacks {sum(error for _, error in errors) / len(errors):.1%} of the change")
    for name, error in errors[:5]:
        print(f"{error:.1%} of {name}")


if __name__ == "__main__":
    run_script(main)
