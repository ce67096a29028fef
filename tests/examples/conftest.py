"""Made-up emoji art for the examples that train on emoji: discs of 256 px, and for VILA-U shapes of 128 px."""

import io
import json
import zipfile

import pytest
from PIL import Image, ImageDraw

from examples.train_emoji import prepare_data
from examples.train_emoji.latents import taught_scenes
from examples.train_emoji.scenes import STYLES, Art, Scenes
from examples.train_vila_u_emoji.scenes import EmojiArt


NAMES = [f"{color} {shape}" for color in ("red", "blue", "green") for shape in ("ball", "box", "tile")]


@pytest.fixture(scope="session")
def small_pack(tmp_path_factory):
    """A zip like that of prepare_data: nine objects in two styles, and nine more that cannot be prompted."""
    path = tmp_path_factory.mktemp("emoji") / "emoji.zip"
    rows = [{"hexcode": f"{i:x}", "label": name, "subgroup": "sport"} for i, name in enumerate(NAMES)]
    rows += [{"hexcode": f"{100 + i:x}", "label": f"sign {i}", "subgroup": "other-symbol"} for i in range(40)]
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("metadata.json", json.dumps(rows))
        for style in STYLES:
            for i, row in enumerate(rows):
                image = Image.new("RGBA", (128, 128))
                fill = row["label"].split()[0] if i < len(NAMES) else "gray"
                draw = ImageDraw.Draw(image)
                shape = (draw.ellipse, draw.rectangle, draw.chord)[i % 3]
                shape((16, 16, 112, 112), *((0, 180) if i % 3 == 2 else ()), fill=fill, outline="black")
                buffer = io.BytesIO()
                image.save(buffer, "webp")
                out.writestr(f"{style}/{row['hexcode']}.webp", buffer.getvalue())
    return path


@pytest.fixture(scope="session")
def small_art(small_pack):
    return EmojiArt(small_pack)


WORDS = ("cat", "dog", "bread", "key", "red ball", "blue ball", "tomato", "ufo")
FILLS = {"red ball": "red", "blue ball": "blue"}


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """A pack like that of prepare_data: discs of 256 px."""
    images = []
    for word in WORDS:
        image = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(image).ellipse((16, 16, 240, 240), fill=FILLS.get(word, "brown"))
        images.append(image)
    path = tmp_path_factory.mktemp("emoji") / "emoji-256.zip"
    rows = [{"object": word} for word in WORDS]
    prepare_data.write_pack(path, rows, {style: images for style in STYLES}, quality=95)
    return path


@pytest.fixture(scope="session")
def art(pack):
    return Art(pack)


def few_scenes(objects):
    """Four scenes of each kind, in place of `taught_scenes`."""
    scenes = taught_scenes(objects, pairs=4)
    return [scene for kind in Scenes.KINDS for scene in [s for s in scenes if s.kind == kind][:4]]
