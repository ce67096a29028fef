"""Post-train a LoRA for Sana by rewards, with DiffusionNFT (arXiv 2509.16117).

    python examples/train_sana_nft.py --prompts prompts.txt --pretrained my/sana-pipeline --reward pickscore

Each step generates `--group-size` images of each of `--batch-size` prompts, judges them, and trains on them.
`--reward` names one or several judges; `my_module:my_function` is any function of images `[B, 3, H, W]` in [0, 1] and
B prompts that returns B numbers. `--rollout-quantize nvfp4 --group-size 96 --kept-per-group 24` explores with a 4-bit
copy, and trains on the best and the worst images, generated again in 16 bits (Sol-RL, arXiv 2604.06916). Images are
generated without guidance; so use the result, `OUTPUT_DIR/model/pytorch_lora_weights.safetensors`, with
`guidance_scale=1`.

Python: `diffusers_sana.training.recipes.nft.train(config, batches, transformer, encoders, reward, ...)`.
"""

from diffusers_sana.arguments import run_script
from diffusers_sana.training.recipes.options import run_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the recipe `diffusers_sana/training/recipes/nft.py`."""
    run_recipe("nft", argv, __doc__)


if __name__ == "__main__":
    run_script(main)
