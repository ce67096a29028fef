"""Hook of MkDocs: links from a page to files of the repository, which are no part of the site.

With `repo_url` in mkdocs.yml they lead there; without, the path is shown where the pointer rests on their text.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError


ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """The page with links that the site can follow; ends the build where the file of one is not there."""

    def outside(match: re.Match[str]) -> str:
        text, path, anchor = match.groups()
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_path} links to ../{path}, which is not there.")
        if not config.repo_url:
            return f'<abbr title="{path}">{text}</abbr>'
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor or ''})"

    return LINK.sub(outside, markdown)
