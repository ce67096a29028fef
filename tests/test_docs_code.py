"""The code on the pages that newcomers copy from runs as it stands there, block after block, in an empty folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("from_diffusers", 2),
        ("modular", 2),
        ("recipes", 9),
        ("training_options", 9),
        ("video", 1),
        ("post_training", 3),
    ],
)
def test_the_blocks_of_a_page_run(page, least, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= least
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    if page == "video":
        with Image.open(tmp_path / "apple.webp") as video:
            assert (video.n_frames, video.size) == (5, (128, 128))
    if page == "modular":
        with Image.open(tmp_path / "symmetric.png") as image:
            assert image.width == image.height
    if page == "recipes":
        assert (tmp_path / "fox.png").stat().st_size > 1000
        assert "fox" in result.stdout
        assert (tmp_path / "sana-int4" / "transformer").is_dir()
