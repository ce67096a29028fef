"""The bundled checkpoints as repositories of the Hub: as they are, and the pipelines in 4 bits.

    python -m tools.publish.checkpoints [--owner NAME] [--push]

Writes one folder per repository, each with its model card. SANA-Sprint, which is bundled without the parts that it
shares with sana-emoji, becomes a whole pipeline.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from diffusers_sana import (
    SanaPipeline,
    SanaSprintPipeline,
    SVDQuantConfig,
    quantize,
)
from diffusers_sana.checkpoints import (
    EMOJI_PROBE,
    SANA_EMOJI,
    SANA_EMOJI_EDGES,
    SANA_EMOJI_PIXEL_ART,
    SANA_EMOJI_SPRINT,
    VILA_U_EMOJI,
)
from tools.publish.hub import ROOT, fresh, parse_args, publish


AS_THEY_ARE = (SANA_EMOJI, SANA_EMOJI_EDGES, SANA_EMOJI_PIXEL_ART, VILA_U_EMOJI, EMOJI_PROBE)
PRECISIONS = ("int4", "nvfp4")
# Constants of the package that the cards load from -> repository.
CONSTANTS = {
    "SANA_EMOJI_SPRINT": "sana-emoji-sprint",
    "SANA_EMOJI_PIXEL_ART": "sana-emoji-pixel-art",
    "SANA_EMOJI_EDGES": "sana-emoji-edges",
    "SANA_EMOJI": "sana-emoji",
    "VILA_U_EMOJI": "vila-u-emoji",
}
SPRINT_CODE = """```python
from diffusers_sana import SanaSprintPipeline

pipe = SanaSprintPipeline.from_pretrained("{owner}/sana-emoji-sprint")
image = pipe("a fox on a green background", num_inference_steps=1).images[0]
```"""


def sana() -> SanaPipeline:
    """The pipeline of sana-emoji in 16 bit."""
    return SanaPipeline.from_pretrained(SANA_EMOJI, dtype=torch.bfloat16)


def sprint() -> SanaSprintPipeline:
    """The pipeline of sana-emoji-sprint in 16 bit, whole."""
    return SanaSprintPipeline.from_teacher(sana(), SANA_EMOJI_SPRINT)


def hub_card(text: str, owner: str) -> str:
    """The card of a bundled checkpoint for the Hub: it loads from there, and links to no file of this repository."""
    text = re.sub(r"from diffusers_sana\.checkpoints import .*\n", "", text)
    for constant, name in CONSTANTS.items():
        text = re.sub(rf"\b{constant}\b", f'"{owner}/{name}"', text)
    text = re.sub(r"\(\.\./(sana-emoji[\w-]*)(?:/README\.md)?\)", rf"(https://huggingface.co/{owner}/\1)", text)
    return re.sub(r"\[([^]]+)\]\((?:\.\./)+[^)]*\)", r"\1", text)


def write_card(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "NOTICE", folder)  # the licenses of the data


def write_quantized(pipe: Any, folder: Path, precision: str, owner: str) -> None:
    """Quantizes a pipeline into a folder; its card names the repositories of both."""
    quantize(pipe, SVDQuantConfig(precision=precision), components=["transformer"], folder=folder, progress=False)
    card = (folder / "README.md").read_text(encoding="utf-8")
    base = folder.name.removesuffix(f"-{precision}")
    head = f"base_model: {owner}/{base}\nbase_model_relation: quantized\nlicense: apache-2.0\n"
    card = card.replace("---\n", f"---\n{head}", 1).replace(
        f'from_pretrained("{folder.name}"', f'from_pretrained("{owner}/{folder.name}"'
    )
    write_card(folder, card)


def write(out: Path, owner: str) -> list[Path]:
    """Writes all folders."""
    for bundled in map(Path, AS_THEY_ARE):
        shutil.copytree(bundled, out / bundled.name)
        write_card(out / bundled.name, hub_card((bundled / "README.md").read_text(encoding="utf-8"), owner))
    folder = out / Path(SANA_EMOJI_SPRINT).name
    sprint().save_pretrained(folder)
    card = (Path(SANA_EMOJI_SPRINT) / "README.md").read_text(encoding="utf-8")
    card = re.sub(r"```python\n.*?```", SPRINT_CODE.format(owner=owner), card, flags=re.DOTALL)
    card = re.sub(r"Only .* are\nhere; ", "", card)
    write_card(folder, hub_card(card, owner))
    for make, name in ((sana, "sana-emoji"), (sprint, "sana-emoji-sprint")):
        for precision in PRECISIONS:
            write_quantized(make(), out / f"{name}-{precision}", precision, owner)
    return sorted(path for path in out.iterdir() if path.is_dir())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(__doc__, ROOT / "build" / "hub" / "checkpoints", argv)
    for folder in write(fresh(args.out), args.owner):
        publish(folder, f"{args.owner}/{folder.name}", "model", args.push)


if __name__ == "__main__":
    main()
