"""Fetches free emoji art with npm and packs it into one zip file.

    python -m examples.train_emoji.prepare_data --out outputs/emoji-256.zip
    python -m examples.train_emoji.prepare_data --size 128 --out outputs/emoji.zip

Sources: Fluent emoji by Microsoft in two styles, as packed by LobeHub (MIT), and names by emojibase (MIT). See NOTICE.

At 128 px the zip holds all 1,604 emoji as `<style>/<hexcode>.webp` (RGBA), and `metadata.json` with the label and the
subgroup of each. At 256 px, the size of the source, it holds only the `OBJECTS` of `scenes.py`, 2.4 MB, as
`<style>/<object>.webp`, and their words in `metadata.json`: the models have to know every image by heart, so what no
prompt names would cost them quality.
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

from diffusers_sana.files import atomic_write

from .scenes import OBJECTS, STYLES


PACKAGES = {
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "flat": "@lobehub/fluent-emoji-flat@1.1.0",
    "names": "emojibase-data@17.0.0",
}
SIZES = (128, 256)


def fetch(package: str, folder: Path) -> Path:
    """Downloads an npm package; returns the path of its `.tgz`."""
    out = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    ).stdout
    return folder / out.split()[-1]


def read_art(archive: Path, size: int, wanted: set[str]) -> dict[str, Image.Image]:
    """Hex code -> RGBA image of `size` px, from WebP or SVG, of those `wanted`."""
    import resvg_py

    images = {}
    with tarfile.open(archive) as tar:
        for member in tqdm(tar.getmembers(), desc=f"reading {archive.name}"):
            stem, _, suffix = member.name.rpartition("/")[2].rpartition(".")
            file = tar.extractfile(member) if suffix in ("svg", "webp") and stem in wanted else None
            if file is None:
                continue
            data = file.read()
            if suffix == "svg":
                data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=2 * size, height=2 * size))
            image = Image.open(io.BytesIO(data)).convert("RGBA")
            # Reduced with premultiplied alpha, or edges would take up the color of invisible pixels.
            images[stem] = image.convert("RGBa").resize((size, size), Image.Resampling.BOX).convert("RGBA")
    return images


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


def write_pack(path: Path, rows: list[dict], art: dict[str, list[Image.Image]], quality: int) -> None:
    """The zip file: `metadata.json` with `rows`, and an image of each style for each row, named by its first value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, zipfile.ZipFile(partial, "w") as pack:
        pack.writestr("metadata.json", json.dumps(rows, indent=1))
        for style, images in art.items():
            for row, image in zip(rows, tqdm(images, desc=f"packing {style}"), strict=True):
                buffer = io.BytesIO()
                image.save(buffer, "webp", quality=quality, method=4)
                pack.writestr(f"{style}/{next(iter(row.values()))}.webp", buffer.getvalue())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/emoji-256.zip"), help="the zip file to write")
    parser.add_argument("--size", type=int, choices=SIZES, default=256, help="256 for Sana, 128 for VILA-U")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        archives = {key: fetch(package, Path(folder)) for key, package in PACKAGES.items()}
        names = read_names(archives["names"])
        if args.size == 256:
            by_label = {row["label"]: row for row in names}
            names = [{"object": word, **by_label[label]} for word, label in OBJECTS.items()]
        wanted = {row["hexcode"] for row in names}
        art = {style: read_art(archives[style], args.size, wanted) for style in STYLES}

    names = [row for row in names if all(row["hexcode"] in images for images in art.values())]
    ordered = {style: [images[row["hexcode"]] for row in names] for style, images in art.items()}
    if args.size == 256:
        names = [{"object": row["object"]} for row in names]
    write_pack(args.out, names, ordered, quality=95 if args.size == 256 else 92)
    print(f"{args.out}: {len(names)} emoji in {len(art)} styles, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
