"""Caption a folder of images with one or several vision-language models, for Sana's training (arXiv 2410.10629).

    python examples/caption_images.py --data photos --models llava-hf/llava-1.5-7b-hf Qwen/Qwen2.5-VL-3B-Instruct \
        --clip openai/clip-vit-base-patch16

A model is any that transformers' `AutoModelForImageTextToText` loads, VILA-U included, or a folder of a VilaUPipeline;
`vila-u-emoji` is the bundled one. Captions go to `captions.jsonl` in the folder, next to those that the images came
with. A model captions an image once, and again only if image, prompt or model have changed: run it again to continue,
or to add models. With `--clip` each caption gets a CLIP score.
"""

from pathlib import Path

from diffusers_sana.arguments import ArgumentParser, add_device, find_device, integer, run_script


def main(argv: list[str] | None = None) -> None:
    """The command line: a folder and the names of models."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of images, searched with its subfolders")
    parser.add_argument("--models", nargs="*", default=[], help="Hub ids or folders; they run one after another")
    parser.add_argument("--clip", help="Hub id or folder of a CLIPModel that scores the captions; default: no scores")
    parser.add_argument("--prompt", help="the request for a caption; default: one for a detailed paragraph")
    parser.add_argument("--max-new-tokens", type=integer(), default=256, help="length limit of a caption")
    parser.add_argument("--batch-size", type=integer(), default=8, help="images at a time; some models take only 1")
    add_device(parser)
    args = parser.parse_args(argv)
    if not args.data.is_dir():
        raise OSError(f"--data must be a folder of images, but there is no folder {args.data}")

    from diffusers_sana.training.recipes.captions import PROMPT, caption_folder

    caption_folder(
        args.data,
        args.models,
        PROMPT if args.prompt is None else args.prompt,
        args.max_new_tokens,
        args.batch_size,
        args.clip,
        find_device(args.device),
        args.dtype,
    )


if __name__ == "__main__":
    run_script(main)
