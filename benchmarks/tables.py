"""Writes the tables of docs/performance.md from the committed results.

    python -m benchmarks.tables

A table stands between `<!-- table NAME -->` and `<!-- end -->`; `tests/test_docs.py` holds the page to the results.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS


PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def render(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def models_cpu() -> str:
    """Seconds, speed-up and memory of the models on the CPU."""
    report = json.loads((RESULTS / "cpu" / "models.json").read_text())
    rows = []
    for name, case in report["cases"].items():
        low, high = case["speedup_range"]
        spread = f" ({low:.2f}-{high:.2f})" if case["rounds"] > 1 else ""
        seconds, memory = case["seconds"], case["peak_mib"]
        rows.append(
            [
                name,
                f"{seconds['diffusers']:.1f}",
                f"{seconds['diffusers_sana']:.1f}",
                f"**{case['speedup']:.2f}x**{spread}",
                f"{memory['diffusers']:.0f}",
                f"{memory['diffusers_sana']:.0f}",
                f"{case['difference']:.0e}",
            ]
        )
    table = render(["case", "diffusers s", "ours s", "faster", "diffusers MiB", "ours MiB", "outputs differ by"], rows)
    return f"{table}\n\n{provenance(report)}"


def kernels_compiled() -> str:
    """Registers, shared memory and spills of every kernel: the most over its shapes, by architecture."""
    report = json.loads((RESULTS / "compile" / "kernels.json").read_text())
    architectures = list(report["shared_kib_limits"])
    kernels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in report["kernels"]:
        kernels.setdefault(row["kernel"].strip("_"), {}).setdefault(row["architecture"], []).append(row)

    def cell(rows: list[dict[str, Any]]) -> str:
        registers, shared, spilled = (
            max(row[key] for row in rows) for key in ("registers", "shared_kib", "spilled_bytes")
        )
        return f"{registers} / {shared:.0f}" + (f" / **{spilled} spilled**" if spilled else "")

    rows = [[f"`{name}`", *(cell(found[name_]) for name_ in architectures)] for name, found in sorted(kernels.items())]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{render(['kernel', *architectures], rows)}\n\n`{report['command']}`, {versions}."


def provenance(report: dict[str, Any]) -> str:
    """What every figure must state."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"`{report['command']}` on {report['device']}, {report['threads']} threads; {versions}."


TABLES: dict[str, Callable[[], str]] = {"models_cpu": models_cpu, "kernels_compiled": kernels_compiled}


def filled(page: str) -> str:
    """`page` with every table made anew."""

    def fill(match: re.Match) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
