"""Distil a Sana into a SANA-Sprint, which generates in one to four steps (arXiv 2503.09641).

    python examples/train_sana_sprint.py --data photos --pretrained some/sana-pipeline --cache-dir cache \\
        --output-dir outputs/sprint

The folder holds images and their captions, in any layout that docs/data.md lists; `--data` may also be WebDataset tars
or a dataset of the Hub. The student starts as the teacher and learns by continuous-time consistency and from a
discriminator on the frozen teacher's features. The result, `OUTPUT_DIR/model`, is a SanaSprintPipeline folder.

Python: `diffusers_sana.training.recipes.sprint.train(config, batches, teacher, ...)` takes any iterable of batches.
"""

from diffusers_sana.arguments import run_script
from diffusers_sana.training.recipes.options import run_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the recipe `diffusers_sana/training/recipes/sprint.py`."""
    run_recipe("sprint", argv, __doc__)


if __name__ == "__main__":
    run_script(main)
