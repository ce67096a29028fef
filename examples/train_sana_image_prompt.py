"""Train an IP-Adapter, by which a Sana takes images as prompts (arXiv 2308.06721); the transformer stays as it is.

    python examples/train_sana_image_prompt.py --data photos --pretrained some/sana-pipeline \\
        --image-encoder google/siglip-base-patch16-224 --output-dir outputs/image-prompt

The folder holds images and their captions, in any layout that docs/data.md lists; `--data` may also be WebDataset tars
or a dataset of the Hub. The image encoder is a vision encoder of transformers, or a VILA-U. The result,
`OUTPUT_DIR/model`, is what `pipe.load_ip_adapter` loads.

Python: `diffusers_sana.training.recipes.image_prompt.train(config, batches, adapter, transformer, ...)`.
"""

from diffusers_sana.arguments import run_script
from diffusers_sana.training.recipes.options import run_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the recipe `diffusers_sana/training/recipes/image_prompt.py`."""
    run_recipe("image_prompt", argv, __doc__)


if __name__ == "__main__":
    run_script(main)
