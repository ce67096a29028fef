"""The documentation as a site: builds without a warning, complete, and loads nothing from elsewhere."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
LOADED = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Resources(HTMLParser):
    """Addresses that a browser fetches by itself to show a page."""

    def __init__(self, html: str):
        super().__init__()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        address = dict(attributes).get(LOADED.get(tag, ""))
        if address:
            self.addresses.append(address)


def named_in_nav(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [name for item in nav for name in named_in_nav(list(item.values()) if isinstance(item, dict) else item)]


def test_every_page_is_in_nav_once():
    config = (ROOT / "mkdocs.yml").read_text()
    named = named_in_nav(yaml.safe_load(config)["nav"])
    assert sorted(named) == [page.name for page in PAGES]


def test_pages_are_built_from_their_sources(site):
    for page in PAGES:
        built = site / ("" if page.stem == "index" else page.stem) / "index.html"
        title = page.read_text().partition("\n")[0].removeprefix("# ")
        assert f">{title}<" in built.read_text(), page.name


def test_nothing_is_loaded_from_elsewhere(site):
    built = list(site.rglob("*.html"))
    assert len(built) > len(PAGES)
    for path in built:
        addresses = Resources(path.read_text()).addresses
        assert addresses
        assert not [address for address in addresses if re.match(r"(https?:)?//", address)], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", path.read_text()), path


def test_links_out_of_the_docs_are_no_dead_links(site):
    """They lead to no page of the site: without `repo_url`, their text and path are left."""
    assert "](../tests/" in (DOCS / "differences.md").read_text()
    html = (site / "differences" / "index.html").read_text()
    assert '<abbr title="tests/models/test_controlnet_sana.py"><code>' in html
    assert 'href="../../tests' not in html
    assert 'href="../tests' not in html


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_links_to_files(path):
    """As GitHub follows them, which shows the pages too."""
    for address in LINK.findall(path.read_text()):
        if not re.match(r"https?:|#", address):
            target = address.partition("#")[0]
            assert (path.parent / target).exists(), address


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.stem)
def test_python_in_pages_can_be_read(path):
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        ast.parse(block)


def test_every_kernel_is_listed():
    page = (DOCS / "kernels.md").read_text()
    kernels = ROOT / "diffusers_sana" / "kernels"
    named = {path.stem for path in kernels.glob("*.py")} & {path.stem for path in (kernels / "triton").glob("*.py")}
    for name in named - {"__init__", "low_bit"}:  # the formats, whose kernels are parts of others
        for link in (f"tests/kernels/test_{name}.py", f"benchmarks/bench_{name}.py"):
            assert f"](../{link})" in page, link
