"""A committed result as a table of a page: what `benchmarks.tables` and `benchmarks.emoji_tables` share."""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import RESULTS


def render(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def results(name: str) -> dict[str, Any]:
    """A committed result file, by its path under the folder of results and without its ending."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def provenance(report: dict[str, Any]) -> str:
    """What every figure must state."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"`{report['command']}` on {report['device']}, {report['threads']} threads; {versions}."
