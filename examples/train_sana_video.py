"""Train a SANA-Video text-to-video transformer, or a LoRA for one, by flow matching (arXiv 2509.24695).

    python examples/train_sana_video.py --data videos --pretrained some/sana-video-pipeline --output-dir outputs/video
    python examples/train_sana_video.py --data videos --pretrained some/sana-video-pipeline --lora --quantize int4

The folder holds videos (.gif, .webp; .mp4 and others with `imageio-ffmpeg`), images, which are videos of one frame,
and their captions, in any layout of a folder that docs/data.md lists. Latents and text vectors are computed once.
`--pretrained` may also be a SanaPipeline, whose weights the model of videos then begins with. `--causal` trains chunk
by chunk, as LongSANA generates. The result, `OUTPUT_DIR/model`, is a SanaVideoPipeline folder, or a LoRA for
`pipe.load_lora_weights`.

Python: `diffusers_sana.training.recipes.sana_video.train(config, batches, transformer, ...)` takes any iterable of
batches.
"""

from diffusers_sana.arguments import run_script
from diffusers_sana.training.recipes.options import run_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the recipe `diffusers_sana/training/recipes/sana_video.py`."""
    run_recipe("sana_video", argv, __doc__)


if __name__ == "__main__":
    run_script(main)
