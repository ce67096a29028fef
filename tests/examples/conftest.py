"""Made-up emoji art for the examples that train on emoji."""

import io
import json
import zipfile

import pytest
from PIL import Image, ImageDraw

from examples.train_emoji.data import STYLES, EmojiArt


NAMES = [f"{color} {shape}" for color in ("red", "blue", "green") for shape in ("ball", "box", "tile")]


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
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
def art(pack):
    return EmojiArt(pack)
