"""The code on the pages that newcomers copy from runs as it stands there, block after block, in an empty folder."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).parents[1]
# Page -> how many blocks it has at least.
PAGES = {
    "from_diffusers": 2,
    "image_prompts": 1,
    "modular": 2,
    "post_training": 4,
    "recipes": 9,
    "training_options": 9,
    "video": 1,
}
# Imports, which take longer than most pages, happen once: each page runs in a fork, with its own folder and output.
RUN = """
import json, os, sys, traceback
from diffusers_sana import SanaPipeline
for page, code in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        os.chdir(page)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(f"../{page}.{stream.name.strip('<>')}", os.O_WRONLY | os.O_CREAT), stream.fileno())
        try:
            exec(compile(code, page, "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        else:
            status = 0
        sys.stdout.flush()
        os._exit(status)
    with open(f"{page}.status", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder with a folder of each page, and its `.status`, `.stdout` and `.stderr` beside it."""
    folder, pages = tmp_path_factory.mktemp("pages"), {}
    for page, least in PAGES.items():
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(blocks) >= least, page
        pages[page] = "\n".join(blocks)
        (folder / page).mkdir()
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUN, json.dumps(pages)], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, run):
    assert (run / f"{page}.status").read_text() == "0", (run / f"{page}.stderr").read_text()[-2000:]
    if page == "video":
        with Image.open(run / page / "apple.webp") as video:
            assert (video.n_frames, video.size) == (5, (256, 256))
    if page == "modular":
        with Image.open(run / page / "symmetric.png") as image:
            assert image.width == image.height
    if page == "recipes":
        assert (run / page / "fox.png").stat().st_size > 1000
        assert "fox" in (run / f"{page}.stdout").read_text()
        assert (run / page / "sana-int4" / "transformer").is_dir()
