"""The blind test: a reader who has not seen the prompts names what a sheet of images shows.

    python -m examples.train_emoji.blind sheet --model outputs/sana-emoji/pipeline --out outputs/blind
    python -m examples.train_emoji.blind score outputs/blind/answers.txt --out outputs/blind

`sheet` writes `sheet.png`: numbered images of the first held-out prompts, without captions. The reader names each
freely, with no list of words to choose from, one line per image: `7: a hedgehog`. `score` counts the answers that
have the object's word or one that `synonyms.json` accepts. Both were written before the first sheet.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from benchmarks.harness import environment
from diffusers_sana import SanaPipeline
from diffusers_sana.checkpoints import SANA_EMOJI
from diffusers_sana.files import read_json, read_lines

from .common import generate
from .scenes import OBJECTS, Scene, held_out_scenes


COUNT, COLUMNS = 50, 10
SYNONYMS = Path(__file__).parent / "synonyms.json"


def blind_scenes() -> list[Scene]:
    """The held-out scenes of the sheet: the first `COUNT`, which show one object each."""
    return held_out_scenes(list(OBJECTS))[:COUNT]


def write_sheet(images: torch.Tensor, path: Path) -> None:
    """One PNG of images `[N, 3, H, W]` in [-1, 1], with their numbers from 1."""
    side, strip = images.shape[-1], 24
    sheet = Image.new("RGB", (COLUMNS * side, -(-len(images) // COLUMNS) * (side + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % COLUMNS * side, i // COLUMNS * (side + strip)
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels), (x, y + strip))
        draw.text((x + 4, y + 4), str(i + 1), "black", font_size=18)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def words(text: str) -> str:
    """Lower-case words with single spaces around each, and no marks or articles."""
    found = re.findall(r"[a-z0-9]+", text.lower())
    return f" {' '.join(word for word in found if word not in ('a', 'an', 'the'))} "


def is_named(answer: str, word: str, synonyms: dict[str, list[str]]) -> bool:
    """Whether an answer names the object: it has the word or a synonym, as whole words, also with a plural s.

    Only the first name counts: what follows "or" or "/" is a second guess.
    """
    given = words(re.split(r"\bor\b|/", answer)[0])
    accepted = (words(name).strip() for name in (word, *synonyms.get(word, ())))
    return any(f" {name}{ending} " in given for name in accepted for ending in ("", "s", "es"))


def read_answers(path: Path) -> dict[int, str]:
    """Image number -> answer.

    Raises:
        ValueError: a line is not a number, a colon and an answer.
    """
    answers = {}
    for number, line in read_lines(path):
        parts = re.fullmatch(r"\s*(\d+)\s*[:.]\s*(.*)", line)
        if parts is None:
            raise ValueError(f"line {number} of {path} must be like `7: a hedgehog`, got {line!r}")
        answers[int(parts[1])] = parts[2]
    return answers


def score(answers: dict[int, str]) -> dict:
    """How many of the sheet's images are named right, and what was said of the others."""
    synonyms, scenes = read_json(SYNONYMS), blind_scenes()
    wrong = {}
    for number, scene in enumerate(scenes, start=1):
        if not is_named(answers.get(number, ""), scene.objects[0], synonyms):
            wrong[f"{number}: {scene.prompt}"] = answers.get(number, "")
    return {"images": len(scenes), "named": len(scenes) - len(wrong), "not_named": wrong}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet", help="generate the images")
    sheet.add_argument("--model", default=SANA_EMOJI, help="pipeline folder; default: the bundled one")
    sheet.add_argument("--steps", type=int, default=20)
    scored = commands.add_parser("score", help="count the right answers")
    scored.add_argument("answers", type=Path, help="file with a line per image")
    for command in (sheet, scored):
        command.add_argument("--out", type=Path, default=Path("outputs/blind"), help="folder of the sheet and figures")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "sheet":
        pipe = SanaPipeline.from_pretrained(args.model)
        prompts = [scene.prompt for scene in blind_scenes()]
        write_sheet(generate(pipe, prompts, num_inference_steps=args.steps), args.out / "sheet.png")
        return
    report = environment() | score(read_answers(args.answers))
    (args.out / "blind.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
