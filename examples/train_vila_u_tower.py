"""Train VILA-U's vision tower: images to token ids that mean what the caption says, and back (arXiv 2409.04429).

    python examples/train_vila_u_tower.py --data photos --siglip google/siglip-large-patch16-256 --output-dir out/tower
    python examples/train_vila_u_tower.py --data photos --pretrained out/tower/model --tokenizer some/tokenizer ...

The folder holds images and their captions, in any layout that docs/data.md lists; `--data` may also be WebDataset tars
or a dataset of the Hub. The paper starts from SigLIP and freezes its text tower; without pretrained weights, both
losses together need easy data.

Python: `diffusers_sana.training.recipes.vila_u_tower.train(config, batches, model, tokenizer)`.
"""

from diffusers_sana.arguments import run_script
from diffusers_sana.training.recipes.options import run_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the recipe `diffusers_sana/training/recipes/vila_u_tower.py`."""
    run_recipe("vila_u_tower", argv, __doc__)


if __name__ == "__main__":
    run_script(main)
