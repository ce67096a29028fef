"""Train a deep-compression autoencoder in the three phases of DC-AE (arXiv 2410.10733).

    python examples/train_dc_ae.py --data photos --model-config config.json --output-dir outputs/ae1
    python examples/train_dc_ae.py --data photos --pretrained outputs/ae1/model --phase 2 --output-dir outputs/ae2
    python examples/train_dc_ae.py --data photos --pretrained outputs/ae2/model --phase 3 --output-dir outputs/ae3

The result, `OUTPUT_DIR/model`, is what `AutoencoderDC.from_pretrained` loads, here and in diffusers.

Python: `diffusers_sana.training.recipes.dc_ae.train(config, batches, model)` takes any iterable of batches.
"""

from diffusers_sana.arguments import run_script
from diffusers_sana.training.recipes.options import run_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the recipe `diffusers_sana/training/recipes/dc_ae.py`."""
    run_recipe("dc_ae", argv, __doc__)


if __name__ == "__main__":
    run_script(main)
