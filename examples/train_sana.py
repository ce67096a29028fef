"""Train a Sana text-to-image transformer by flow matching (arXiv 2410.10629).

    python examples/train_sana.py --data photos --pretrained some/sana-pipeline --output-dir outputs/sana

The folder holds images and their captions, in any layout that docs/data.md lists; `--data` may also be WebDataset tars
or a dataset of the Hub. The models come from a pipeline; `--transformer-config` starts a new transformer,
`--sample-size` and `--interpolation-scale` prepare the old one for another resolution, `--cache-dir` computes latents
and text vectors once. The result, `OUTPUT_DIR/model`, is a SanaPipeline folder.

Python: `diffusers_sana.training.recipes.sana.train(config, batches, transformer, ...)` takes any iterable of batches.
"""

from diffusers_sana.arguments import run_script
from diffusers_sana.training.recipes.options import run_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the recipe `diffusers_sana/training/recipes/sana.py`."""
    run_recipe("sana", argv, __doc__)


if __name__ == "__main__":
    run_script(main)
