"""Post-train a LoRA for Sana on pairs of images, of which one is preferred, by Diffusion-DPO (arXiv 2311.12908).

    python examples/train_sana_dpo.py --pairs pairs.jsonl --pretrained my/sana-pipeline
    python examples/train_sana_dpo.py --prompts prompts.txt --reward pickscore --pretrained my/sana-pipeline

`pairs.jsonl` has lines such as `{"prompt": "a cat", "preferred": "cat_1.png", "rejected": "cat_2.png"}`. With
`--prompts`, `--group-size` images of each prompt are generated into `OUTPUT_DIR/pairs` first, and a judge chooses the
best and the worst; `--reward` as in train_sana_nft.py. Use the result,
`OUTPUT_DIR/model/pytorch_lora_weights.safetensors`, as any LoRA.

Python: `diffusers_sana.training.recipes.dpo.train(config, batches, transformer, vae, ...)`.
"""

from diffusers_sana.arguments import run_script
from diffusers_sana.training.recipes.options import run_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the recipe `diffusers_sana/training/recipes/dpo.py`."""
    run_recipe("dpo", argv, __doc__)


if __name__ == "__main__":
    run_script(main)
