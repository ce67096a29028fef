"""Train a LoRA for Sana on a folder of images, as DreamBooth does (arXiv 2106.09685, 2208.12242).

    python examples/train_sana_lora.py --data dog --instance-prompt "a photo of sks dog" --pretrained my/sana-pipeline

Captions come from `metadata.jsonl` (lines `{"file_name": ..., "text": ...}`) or from `NAME.txt` beside `NAME.png`;
images without one have `--instance-prompt`. `--data` may also be WebDataset tars or a dataset of the Hub.
`--quantize int4` trains on a base with 4-bit weights (QLoRA, arXiv 2305.14314). `--pretrained` may be a SANA-Sprint.
Latents and text vectors are computed once. The result, `OUTPUT_DIR/model/pytorch_lora_weights.safetensors`, is for
`pipe.load_lora_weights`, here and in diffusers.

Python: `diffusers_sana.training.recipes.lora.train(config, batches, transformer, ...)` takes any iterable of batches.
"""

from diffusers_sana.arguments import run_script
from diffusers_sana.training.recipes.options import run_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the recipe `diffusers_sana/training/recipes/lora.py`."""
    run_recipe("lora", argv, __doc__)


if __name__ == "__main__":
    run_script(main)
