"""What a run shows of itself: sample grids and the loss plot."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_sana.files import read_json_lines


def save_image_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """Write images `[N, 3, H, W]` in [-1, 1] as one PNG, row by row."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    count, _, height, width = pixels.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = torch.full((3, rows * height, columns * width), 255, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * height, index % columns * width
        canvas[:, top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas.permute(1, 2, 0).numpy()).save(path)


def plot_losses(log_path: Path, path: Path) -> None:
    """Plot every term of a `log.jsonl` against the step; thin lines are the log, thick ones a running mean.

    A term that was not finite is null in the log, and a gap in the plot. Nothing is written without a term.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy; only the `train` extra brings it
    from matplotlib.figure import Figure

    rows = [row for _, row in read_json_lines(log_path)]
    terms = [
        name
        for name in dict.fromkeys(name for row in rows for name in row if row[name] is not None)
        if name not in ("step", "minutes", "lr", "images_per_second", "skipped_steps")
    ]
    if not terms:
        return
    figure = Figure(figsize=(8, 2.6 * len(terms)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, term in zip(np.atleast_1d(figure.subplots(len(terms), 1, sharex=True)), terms, strict=True):
        known = [row for row in rows if row.get(term) is not None]
        steps = np.array([row["step"] for row in known])
        values = np.array([row[term] for row in known])
        window = max(1, len(values) // 20)
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(steps, values, linewidth=0.5, alpha=0.5)
        axis.plot(steps[window - 1 :], mean, linewidth=1.5)
        axis.set_ylabel(term)
        axis.set_yscale("log" if (values > 0).all() else "linear")
        axis.grid(alpha=0.3)
    axis.set_xlabel("step")
    figure.savefig(path, dpi=120)
