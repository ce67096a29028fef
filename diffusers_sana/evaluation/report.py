"""The report of an evaluation as a JSON file and a Markdown page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers_sana.files import read_json


# Figures of single images -> their label, and digits behind the point.
SCORES = {
    "clip_score": ("CLIP score", 2),
    "pickscore": ("PickScore", 3),
    "hpsv2": ("HPSv2.1", 4),
    "imagereward": ("ImageReward", 3),
    "vqascore": ("VQAScore", 4),
    "dpg": ("DPG-Bench", 2),
}


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def markdown(report: dict[str, Any]) -> str:
    """A report as a page: a table of the models, one per comparison, and the settings."""
    models = report["models"]
    rows: dict[str, dict[str, str]] = {}
    for name, figures in models.items():
        for label, cell in _alone(figures).items():
            rows.setdefault(label, {})[name] = cell
    parts = ["# Evaluation"]
    if rows:
        parts.append(
            table(["", *models], [[label, *(cells.get(name, "") for name in models)] for label, cells in rows.items()])
        )
    for name, figures in report["against"].items():
        parts.append(f"## Against {name}")
        if measures := _measures(figures):
            parts.append(table(["measure", "figure"], [list(row) for row in measures.items()]))
        if figures.get("differences"):
            parts.append(_differences(figures["differences"]))
    settings = "\n".join(f"- {key}: {value}" for key, value in report["settings"].items() if value is not None)
    parts += ["In parentheses: intervals of 95 % confidence."]
    parts += ["## Settings", settings, "- versions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items())]
    return "\n\n".join(parts) + "\n"


def _alone(figures: dict[str, Any]) -> dict[str, str]:
    """Row label -> cell, of one model."""
    cells = {}
    if scenes := figures.get("scenes"):
        cells["**everything the prompt asks for**"] = _percent(scenes["correct"])
        cells |= {f"prompts of {tag}": _percent(fraction) for tag, fraction in scenes["by_tag"].items()}
        cells |= {f"right {name}": _percent(fraction) for name, fraction in scenes["by_property"].items()}
    for name, (label, digits) in SCORES.items():
        if name in figures:
            cells[label] = f"{figures[name]:.{digits}f}{_bounds(figures[f'{name}_interval'], digits)}"
    for category, fraction in figures.get("dpg_by_category", {}).items():
        cells[f"DPG-Bench, {category}"] = _percent(fraction)
    if true := figures.get("true_images"):
        cells |= {f"{label}, to true images": cell for label, cell in _measures(true).items()}
    return cells


def _differences(differences: dict[str, dict[str, Any]]) -> str:
    """The table of `paired.compare_reports`."""
    rows = []
    for name, row in differences.items():
        label, digits = SCORES.get(name, (name, 1))
        scale = 1 if name in SCORES else 100  # shares, in points of percent
        figure, other, gain = (f"{scale * row[key]:.{digits}f}" for key in ("figure", "other", "difference"))
        low, high = row["interval"] or (0, 0)
        bounds = _bounds([scale * low, scale * high] if row["interval"] else None, digits)
        rows.append([label, figure, other, f"{gain}{bounds}", row["prompts"], "no" if low <= 0 <= high else "yes"])
    return table(["measure", "figure", "other", "difference", "prompts", "significant"], rows)


def _percent(fraction: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in fraction["interval"])
    return f"{100 * fraction['share']:.0f} % of {fraction['of']} ({low:.0f} to {high:.0f})"


def _bounds(interval: Sequence[float] | None, digits: int) -> str:
    return "" if interval is None else f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"


def _measures(figures: dict[str, Any]) -> dict[str, str]:
    cells = {}
    for name, label, digits in (("psnr_db", "PSNR, dB", 2), ("ssim", "SSIM", 4), ("lpips", "LPIPS", 4)):
        if name in figures:
            value = figures[name]
            bounds = _bounds(figures[f"{name}_interval"], digits)
            cells[label] = (
                "all pairs are equal" if value is None else f"{value:.{digits}f} of {figures['pairs']} pairs{bounds}"
            )
    for name, label, digits in (("fid", "FID", 3), ("kid", "KID", 5)):
        if name in figures:
            cells[label] = f"{figures[name]:.{digits}f}{_bounds(figures[f'{name}_interval'], digits)}"
    return cells


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Writes `report.json` and `report.md`; returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    return folder / "report.md"


def read_report(path: Path) -> dict[str, Any]:
    """The `report.json` of an evaluation.

    Raises:
        OSError: there is no such file.
        ValueError: it is no report, or one that does not say which image has which prompt.
    """
    report = read_json(path)
    if not isinstance(report, dict) or not report.get("models"):
        raise ValueError(f"{path} must be the report.json of `diffusers-sana evaluate`, but has no `models`")
    if "images" not in report:
        raise ValueError(
            f"{path} must say which image has which prompt, as reports of this version do. Run its evaluation again:"
            " it generates nothing, where its images are still there."
        )
    return report
