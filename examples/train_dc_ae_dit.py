"""Train a class-conditional DiT on the latents of an autoencoder, by flow matching (arXiv 2212.09748, 2401.08740).

    python examples/train_dc_ae_dit.py --data photos --vae mit-han-lab/dc-ae-f64c128-in-1.0-diffusers

`photos` has one sub-folder per class. The autoencoder is any AutoencoderDC, with patches of one latent as in its paper
(arXiv 2410.10733), or an AutoencoderKL, with `--patch-size 2`. Latents are computed once. The result,
`OUTPUT_DIR/model`, is a folder of diffusers' DiTPipeline.

Python: `diffusers_sana.training.recipes.dc_ae_dit.train(config, batches, transformer, class_names, vae)`.
"""

from diffusers_sana.arguments import run_script
from diffusers_sana.training.recipes.options import run_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the recipe `diffusers_sana/training/recipes/dc_ae_dit.py`."""
    run_recipe("dc_ae_dit", argv, __doc__)


if __name__ == "__main__":
    run_script(main)
