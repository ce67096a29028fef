"""The bundled checkpoint in 4 bits beside 16, by `diffusers-sana evaluate`: results/cpu/evaluate_emoji.json.

    python -m benchmarks.evaluate_emoji

Also writes two figures of docs/, of its images in 16 bits: those of all prompts, and of the first of each kind.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from PIL import Image

from benchmarks.harness import RESULTS, environment, write_results
from diffusers_sana import cli
from diffusers_sana.checkpoints import EMOJI_PROBE
from diffusers_sana.files import read_json_lines


FIGURES = Path(__file__).parent.parent / "docs" / "images"
ALL, FIRST = "emoji_held_out.webp", "emoji_grid.webp"
OF_EACH_KIND = 6


def first_of_each_kind() -> list[int]:
    """The numbers of the first `OF_EACH_KIND` prompts of each kind, kind by kind."""
    kinds: dict[str, list[int]] = {}
    for number, (_, check) in enumerate(read_json_lines(Path(EMOJI_PROBE) / "checks.jsonl")):
        kinds.setdefault(check["tag"], []).append(number)
    return [number for numbers in kinds.values() for number in numbers[:OF_EACH_KIND]]


def write_figure(paths: list[Path], out: Path, columns: int, side: int) -> None:
    """The images at `paths`, row by row, each `side` pixels wide."""
    sheet = Image.new("RGB", (columns * side, -(-len(paths) // columns) * side), "white")
    for i, path in enumerate(paths):
        image = Image.open(path).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(image, (i % columns * side, i // columns * side))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, quality=90)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=1000, help="prompts; default: all of them, and the figures")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figures")
    args = parser.parse_args(argv)
    options = ["--quantize", "int4", "--reference-model", "sana-emoji", "--limit", str(args.limit)]
    with tempfile.TemporaryDirectory() as out:
        started = time.process_time()
        cli.main(["evaluate", "sana-emoji", "--out", out, *options])
        seconds = time.process_time() - started
        report = json.loads((Path(out) / "report.json").read_text(encoding="utf-8"))
        in_16_bits = sorted((Path(out) / "reference").glob("*.png"))
        first = first_of_each_kind()
        if len(in_16_bits) > max(first):
            write_figure(in_16_bits, args.figures / ALL, columns=10, side=128)
            write_figure([in_16_bits[number] for number in first], args.figures / FIRST, OF_EACH_KIND, side=192)
    del report["settings"]["out"], report["versions"]  # of this run only; in `environment()`
    write_results("evaluate_emoji", environment() | {"core_seconds": round(seconds)} | report, args.results)


if __name__ == "__main__":
    main()
