"""Train a ControlNet for a Sana transformer that stays as it is (arXiv 2302.05543, 2410.10629).

    python examples/train_sana_controlnet.py --data photos --pretrained some/sana-pipeline --output-dir outputs/edges

The folder holds images and their captions, in any layout that docs/data.md lists; `--data` may also be WebDataset tars
or a dataset of the Hub. The ControlNet learns to follow the edges of the images, or the images of the same names in
`--control-data`. The result, `OUTPUT_DIR/model`, is what `SanaControlNetModel.from_pretrained` loads.

Python: `diffusers_sana.training.recipes.controlnet.train(config, batches, controlnet, transformer, ...)`.
"""

from diffusers_sana.arguments import run_script
from diffusers_sana.training.recipes.options import run_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the recipe `diffusers_sana/training/recipes/controlnet.py`."""
    run_recipe("controlnet", argv, __doc__)


if __name__ == "__main__":
    run_script(main)
