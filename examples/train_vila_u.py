"""Train VILA-U on chats: to answer questions about images and to generate them (arXiv 2409.04429, section 3.2).

    python examples/train_vila_u.py --data chats --pretrained outputs/start --output-dir outputs/vila_u

`--pretrained` is a folder of model and processor; its vision tower stays as it is (`train_vila_u_tower.py` makes one).
The data folder holds images and `chats.jsonl`, one chat per line in the form of transformers' chat templates:

    [{"role": "user", "content": [{"type": "text", "text": "a red cat"}]},
     {"role": "assistant", "content": [{"type": "image", "image": "cat.png"}]}]

The loss covers what the assistant says or shows; a chat with the image on the user's side teaches to answer.

Python: `diffusers_sana.training.recipes.vila_u.train(config, batches, model, processor)`.
"""

from diffusers_sana.arguments import run_script
from diffusers_sana.training.recipes.options import run_recipe


def main(argv: list[str] | None = None) -> None:
    """Run the recipe `diffusers_sana/training/recipes/vila_u.py`."""
    run_recipe("vila_u", argv, __doc__)


if __name__ == "__main__":
    run_script(main)
