"""Fetches free emoji art with npm and packs it into one zip file.

    python -m examples.train_emoji.prepare_data --out outputs/emoji.zip

Sources: Fluent emoji by Microsoft in two styles, as packed by LobeHub (MIT), and names by emojibase (MIT). See NOTICE.
The zip holds `<style>/<hexcode>.webp` (RGBA, 128 x 128) and `metadata.json`: label and subgroup of each.
"""

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm


PACKAGES = {
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "flat": "@lobehub/fluent-emoji-flat@1.1.0",
    "names": "emojibase-data@17.0.0",
}
SIZE = 128


def fetch(package: str, folder: Path) -> Path:
    """Downloads an npm package; returns the path of its `.tgz`."""
    out = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    ).stdout
    return folder / out.split()[-1]


def read_art(archive: Path) -> dict[str, Image.Image]:
    """Hex code -> RGBA picture of `SIZE` px, from WebP or SVG."""
    import resvg_py

    pictures = {}
    with tarfile.open(archive) as tar:
        for member in tqdm(tar.getmembers(), desc=f"reading {archive.name}"):
            stem, _, suffix = member.name.rpartition("/")[2].rpartition(".")
            file = tar.extractfile(member) if suffix in ("svg", "webp") else None
            if file is None:
                continue
            data = file.read()
            if suffix == "svg":
                data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=2 * SIZE, height=2 * SIZE))
            picture = Image.open(io.BytesIO(data)).convert("RGBA")
            # Reduced with premultiplied alpha, or edges would take up the colour of invisible pixels.
            pictures[stem] = picture.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.BOX).convert("RGBA")
    return pictures


def read_names(archive: Path) -> list[dict]:
    """Emoji in Unicode's order: hex code, label, subgroup; variants by skin tone are not listed there."""
    with tarfile.open(archive) as tar:

        def load(name: str):
            file = tar.extractfile(f"package/en/{name}.json")
            assert file is not None, name
            return json.load(file)

        subgroups = {row["order"]: row["key"] for row in load("messages")["subgroups"]}
        return [
            {
                "hexcode": row["hexcode"].lower(),
                "label": row["label"].lower(),
                "subgroup": subgroups.get(row.get("subgroup"), "component"),
            }
            for row in load("data")
        ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/emoji.zip"), help="the zip file to write")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        archives = {key: fetch(package, Path(folder)) for key, package in PACKAGES.items()}
        art = {style: read_art(archives[style]) for style in ("3d", "flat")}
        names = [row for row in read_names(archives["names"]) if all(row["hexcode"] in a for a in art.values())]

    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w") as pack:
        pack.writestr("metadata.json", json.dumps(names, indent=1))
        for style, pictures in art.items():
            for row in tqdm(names, desc=f"packing {style}"):
                buffer = io.BytesIO()
                pictures[row["hexcode"]].save(buffer, "webp", quality=92, method=4)
                pack.writestr(f"{style}/{row['hexcode']}.webp", buffer.getvalue())
    partial.replace(args.out)
    print(f"{args.out}: {len(names)} emoji in {len(art)} styles, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
